"""The reading of machine code by tests/cuda_build, on stored output of cuobjdump: neither it nor nvcc is needed."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "cuda_build"))

import machine_code
from machine_code import Kernel, Rule

# What cuobjdump and nvdisasm 13.5 print for two kernels, with the lines left out that are not looked at. In the second
# two loads wait for one scoreboard, and a third is waited for alone.
RESOURCES = """
Resource usage:
 Common:
  GLOBAL:0
 Function _Z4wideIfEvPK1PIT_EPS2_i:
  REG:14 STACK:0 SHARED:64 LOCAL:0 CONSTANT[0]:372 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Z7spilledPf:
  REG:61 STACK:256 SHARED:0 LOCAL:8 CONSTANT[0]:360 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
LISTING = """
	.target	sm_75
.text._Z4wideIfEvPK1PIT_EPS2_i:
        /*0040*/                   LDG.E.128.SYS R4, [R2] ;
        /*0050*/              @!P0 LDG.E.64.SYS R2, [R2] ;
        /*0060*/              @UP0 STG.E.128.SYS [R6], R4 ;
        /*0070*/                   LDS.U.128 R4, [RZ] ;
        /*0080*/                   LDL.128 R4, [R1] ;
        /*0090*/                   ST.E.128 desc[UR4][R6.64], R4 ;
        /*00a0*/                   LDGSTS.E.BYPASS.128 [R7], desc[UR4][R6.64] ;
        /*00b0*/                   UCGABAR_ARV ;
        /*00c0*/                   UCGABAR_WAIT ;
.text._Z7spilledPf:
.L_x_0:
        /*0040*/                   STG.E desc[UR4][R6.64], R4 ;                   /* 0x0000000406007986 */
                                                                                  /* 0x000fe2000c101904 */
        /*0050*/                   LDG.E.128 R4, desc[UR4][R2.64] ;               /* 0x0000000402047981 */
                                                                                  /* 0x000ea8000c1e1d00 */
        /*0060*/              @!P0 LDG.E.128 R8, desc[UR4][R2.64+0x10] ;          /* 0x0000100402088981 */
                                                                                  /* 0x000ea8000c1e1d00 */
        /*0070*/                   LDG.E.128 R12, desc[UR4][R2.64+0x20] ;         /* 0x00002004020c7981 */
                                                                                  /* 0x000ee8000c1e1d00 */
        /*0080*/                   FADD R4, R4, R8 ;                              /* 0x0000000804047221 */
                                                                                  /* 0x004fc80000000000 */
        /*0090*/                   FADD R4, R4, R12 ;                             /* 0x0000000c04047221 */
                                                                                  /* 0x008fc80000000000 */
"""
NAMES = {"_Z4wideIfEvPK1PIT_EPS2_i": "wide<float>"}


def test_parse() -> None:
    """Every number of its own kernel, generic accesses with the global ones, and none of shared or local memory."""
    wide, spilled = machine_code.parse("sm_75", RESOURCES, LISTING.splitlines(), NAMES)
    assert wide == Kernel(
        "wide<float>",
        "sm_75",
        14,
        0,
        64,
        9,
        wide_loads=1,
        wide_stores=2,
        copies=1,
        cluster_waits=1,
        loads_together=0,
    )
    assert spilled == Kernel(
        "_Z7spilledPf",
        "sm_75",
        61,
        264,
        0,
        6,
        wide_loads=3,
        wide_stores=0,
        copies=0,
        cluster_waits=0,
        loads_together=2,
    )


def test_runtime_calls() -> None:
    """Those that the source names; not what nvcc adds, what the object has itself, nor another library's."""
    symbols = """
                 U cudaLaunchKernelExC
                 U __cudaRegisterFatBinary
                 U cudaMalloc@libcudart.so.13
0000000000000010 T cudaFree
                 U _ZN7bnfused4cuda5statsE
    """
    assert machine_code.runtime_calls(symbols) == {"cudaLaunchKernelExC", "cudaMalloc"}


THREADS = "constexpr int kMaxThreads = 256;"
BOUNDED = "__global__ void __launch_bounds__(kMaxThreads)\n  a(int x) { f(x); }"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOUNDED, "one kMaxThreads"),
        (THREADS + "__global__ void a(int x) { f(x); }", r"__launch_bounds__.* in: __global__ void a\(int x\)"),
        (THREADS + BOUNDED + "\ntemplate <class T> __global__ void b();", r"void b\(\)"),
    ],
)
def test_every_kernel_promises_its_block_size(text: str, message: str, tmp_path: Path) -> None:
    """Without, the compiler allows for 1024 threads, and the number of blocks that is checked is not the real one."""
    source = tmp_path / "a.cuh"
    source.write_text(THREADS + BOUNDED)
    assert machine_code.block_size([source]) == 256
    source.write_text(text)
    with pytest.raises(ValueError, match=message):
        machine_code.block_size([source])


GOOD = Kernel(
    "batch_norm_apply<float>",
    "sm_90",
    64,
    0,
    3136,
    900,
    wide_loads=2,
    wide_stores=1,
    copies=0,
    cluster_waits=0,
    loads_together=8,
)


@pytest.mark.parametrize(
    ("registers", "threads", "arch", "blocks"),
    [
        (64, 256, "sm_90", 4),
        (65, 256, "sm_90", 3),  # a warp gets 256 at a time: 65 are 72
        (128, 256, "sm_90", 2),
        (129, 256, "sm_90", 1),
        (16, 256, "sm_90", 8),  # threads are the limit
        (16, 256, "sm_86", 6),
        (16, 256, "sm_75", 4),
        (255, 512, "sm_80", 0),  # does not launch at all
        (40, 100, "sm_80", 12),  # 4 warps, though not all of the last one's threads are used
    ],
)
def test_blocks_per_sm(registers: int, threads: int, arch: str, blocks: int) -> None:
    assert replace(GOOD, registers=registers, arch=arch).blocks_per_sm(threads) == blocks


RULES = (
    Rule("apply", 3, wide_loads=True, wide_stores=True, loads_together=8),
    Rule("stats", 2, wide_loads=True, wide_stores=False),
    Rule("resident", 2, wide_loads=True, wide_stores=True, copies=True, clusters=True),
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"registers": 96}, "registers for 3 blocks of 256 threads.* got 96 a thread: 2"),
        ({"registers": 96, "name": "batch_norm_stats"}, None),
        ({"local_bytes": 8}, "no local memory, got 8 bytes"),
        ({"shared_bytes": 49153}, "at most 49152 bytes of static shared memory, got 49153"),
        ({"wide_loads": 0}, "128-bit loads"),
        ({"wide_stores": 0}, "128-bit stores"),
        ({"wide_stores": 0, "name": "batch_norm_stats"}, None),
        ({"loads_together": 7}, "8 128-bit loads on their way .*, got 7"),
        ({"name": "a_new_kernel"}, "a rule"),
        ({"name": "batch_norm_resident", "cluster_waits": 1}, "asynchronous copies"),
        ({"name": "batch_norm_resident", "copies": 1}, "waits for the blocks of a cluster"),
        ({"name": "batch_norm_resident", "copies": 1, "cluster_waits": 1}, None),
        ({"name": "batch_norm_resident", "copies": 1, "arch": "sm_80"}, None),
        ({"name": "batch_norm_resident", "arch": "sm_75"}, None),
    ],
)
def test_rules(changes: dict[str, object], message: str | None) -> None:
    wrong = machine_code.broken(replace(GOOD, **changes), RULES, 256)
    if message is None:
        assert wrong == []
    else:
        (line,) = wrong
        assert re.search(message, line), line


def test_tools_of_the_toolkit_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have to be there: cuobjdump without nvdisasm prints no instructions."""
    monkeypatch.setattr(machine_code.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(machine_code.shutil, "which", lambda name: None)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "cuobjdump").touch()
    assert machine_code.find_tools(tmp_path) is None
    (tmp_path / "bin" / "nvdisasm").touch()
    assert machine_code.find_tools(tmp_path) == str(tmp_path / "bin")
