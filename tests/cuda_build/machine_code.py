"""Reads the machine code of the kernels (registers, memory, the width of accesses), and compares it with rules.

It uses ``cuobjdump`` and ``nvdisasm``, which come with the CUDA toolkit and as wheels of requirements-dev.txt.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# Per SM, by compute capability: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
MAX_THREADS = {
    "sm_75": 1024,
    "sm_80": 2048,
    "sm_86": 1536,
    "sm_89": 1536,
    "sm_90": 2048,
    "sm_100": 2048,
    "sm_120": 1536,
}
FIRST_WITH_CLUSTERS = 90
# From the same table, equal for all: each of four schedulers has a quarter of the registers; a warp gets 256 at a time.
SCHEDULERS, REGISTERS_OF_SCHEDULER, REGISTERS_AT_ONCE, WARP = 4, 16384, 256, 32
# Positions in the upper 64 of an instruction's 128 bits. SCOREBOARD: on which of six scoreboards others wait for its
# result; 7 is none. WAITED_ON: a bit for each scoreboard on which it waits itself. Jia, Maggioni, Staiger and
# Scarpazza, "Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking", 2018, section 2; NVIDIA does not
# document it.
SCOREBOARD, WAITED_ON = 46, 52


@dataclass(frozen=True)
class Kernel:
    """One kernel, compiled for one GPU.

    Wide loads and stores move 16 bytes from or to global memory. They are counted as instructions in the listing, so
    unrolled loops have more.
    """

    name: str
    arch: str
    registers: int
    local_bytes: int
    shared_bytes: int  # static
    instructions: int
    wide_loads: int
    wide_stores: int
    copies: int  # from global to shared memory, asynchronous
    cluster_waits: int  # for the other blocks of a cluster
    loads_together: int  # the most wide loads in flight when the kernel waits for one of them

    def blocks_per_sm(self, threads: int) -> int:
        """How many blocks of ``threads`` threads fit on an SM, by their registers and threads."""
        warps_of_block = -(-threads // WARP)
        of_warp = -(-self.registers * WARP // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE
        by_registers = SCHEDULERS * (REGISTERS_OF_SCHEDULER // of_warp) // warps_of_block
        return min(by_registers, MAX_THREADS[self.arch] // threads)


@dataclass(frozen=True)
class Rule:
    """A rule for the kernels in whose names ``pattern`` is found.

    ``shared_bytes`` is the most static shared memory. The default is what every GPU gives a block without a request.
    """

    pattern: str
    blocks_per_sm: int
    wide_loads: bool
    wide_stores: bool
    shared_bytes: int = 48 * 1024
    copies: bool = False  # on GPUs that have asynchronous copies
    clusters: bool = False  # on GPUs that have clusters
    loads_together: int = 0


def broken(kernel: Kernel, rules: Sequence[Rule], threads: int) -> list[str]:
    """What breaks the first rule that fits the name of a kernel with blocks of ``threads`` threads."""
    rule = next((rule for rule in rules if re.search(rule.pattern, kernel.name)), None)
    if rule is None:
        return ["expected a rule for it, found none"]
    wrong = []
    if kernel.local_bytes:
        wrong.append(f"expected no local memory, got {kernel.local_bytes} bytes a thread")
    if (blocks := kernel.blocks_per_sm(threads)) < rule.blocks_per_sm:
        wrong.append(
            f"expected registers for {rule.blocks_per_sm} blocks of {threads} threads on an SM, "
            f"got {kernel.registers} a thread: {blocks}"
        )
    if kernel.shared_bytes > rule.shared_bytes:
        wrong.append(f"expected at most {rule.shared_bytes} bytes of static shared memory, got {kernel.shared_bytes}")
    if rule.wide_loads and not kernel.wide_loads:
        wrong.append("expected 128-bit loads, got none")
    if rule.wide_stores and not kernel.wide_stores:
        wrong.append("expected 128-bit stores, got none")
    if kernel.loads_together < rule.loads_together:
        wrong.append(
            f"expected {rule.loads_together} 128-bit loads on their way before one is waited for, "
            f"got {kernel.loads_together}"
        )
    if rule.copies and not kernel.copies and kernel.arch != "sm_75":
        wrong.append("expected asynchronous copies, got none")
    has_clusters = int(kernel.arch.removeprefix("sm_")) >= FIRST_WITH_CLUSTERS
    if rule.clusters and has_clusters and not kernel.cluster_waits:
        wrong.append("expected waits for the blocks of a cluster, got none")
    return wrong


def block_size(sources: Iterable[Path]) -> int:
    """``kMaxThreads`` of the plan and the kernels' sources; it is what the counts of blocks stand for.

    Raises:
        ValueError: it is not there once, or a kernel does not promise it to the compiler.
    """
    text = "\n".join(path.read_text() for path in sources)
    values = re.findall(r"constexpr int kMaxThreads = (\d+);", text)
    if len(values) != 1:
        raise ValueError(f"expected one kMaxThreads in the kernels, found {len(values)}")
    for kernel in re.findall(r"__global__[^;{]*[;{]", text):
        if "__launch_bounds__(kMaxThreads" not in kernel:
            raise ValueError(f"expected __launch_bounds__(kMaxThreads) in: {kernel}")
    return int(values[0])


@dataclass
class _Listing:
    """Counts in the instructions of one kernel, from the first to the last."""

    instructions: Counter[str] = field(default_factory=Counter)
    on_their_way: Counter[int] = field(default_factory=Counter)  # wide loads, by their scoreboard
    loads_together: int = 0

    def schedule(self, instruction: str, upper_bits: int) -> None:
        """Takes the loads for which ``instruction`` waits from those in flight, and adds it if it is a load."""
        if waited := [board for board in self.on_their_way if upper_bits >> WAITED_ON + board & 1]:
            self.loads_together = max(self.loads_together, sum(self.on_their_way.pop(board) for board in waited))
        scoreboard = upper_bits >> SCOREBOARD & 7
        if re.match(r"LDG?\..*\.128", instruction) and scoreboard != 7:
            self.on_their_way[scoreboard] += 1


def parse(arch: str, resources: str, listing: Iterable[str], demangle: dict[str, str]) -> list[Kernel]:
    """The kernels of one GPU, from what ``cuobjdump --dump-resource-usage`` and ``nvdisasm -c -hex`` print."""
    listings: dict[str, _Listing] = {}
    of_kernel, instruction = _Listing(), ""
    for line in listing:
        if match := re.match(r"\.text\.(\S+):", line):
            of_kernel = listings.setdefault(match[1], _Listing())
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line):
            instruction = match[1]
            of_kernel.instructions[instruction] += 1
        elif match := re.match(r"\s+/\* (0x[0-9a-f]{16}) \*/", line):
            of_kernel.schedule(instruction, int(match[1], 16))
    kernels = []
    pattern = r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    for name, registers, stack, shared, local in re.findall(pattern, resources):
        codes = listings[name].instructions

        def count(space: str, part: str = "", codes: Counter[str] = codes) -> int:
            # LDG, or LD where the compiler does not know the address for one of global memory.
            return sum(n for code, n in codes.items() if re.match(rf"{space}G?\.", code) and part in code)

        kernels.append(
            Kernel(
                name=demangle.get(name, name),
                arch=arch,
                registers=int(registers),
                local_bytes=int(stack) + int(local),
                shared_bytes=int(shared),
                instructions=codes.total(),
                wide_loads=count("LD", ".128"),
                wide_stores=count("ST", ".128"),
                copies=count("LDGSTS"),
                cluster_waits=codes["UCGABAR_WAIT"],
                loads_together=listings[name].loads_together,
            )
        )
    return kernels


def runtime_calls(symbols: str) -> set[str]:
    """The CUDA runtime's functions that an object needs, from what ``nm --undefined-only`` prints.

    It leaves out those with which nvcc itself registers and calls kernels, which begin with ``__cuda``.
    """
    return set(re.findall(r"^\s*U (cuda[A-Z]\w*)", symbols, re.MULTILINE))


def find_tools(toolkit: Path) -> str | None:
    """The folder with cuobjdump and nvdisasm: the toolkit's, the wheels', or one on the PATH."""
    places = [toolkit / "bin"]
    if wheels := importlib.util.find_spec("nvidia"):
        places += [path for base in wheels.submodule_search_locations or [] for path in Path(base).glob("cu*/bin")]
    if found := shutil.which("cuobjdump"):
        places.append(Path(found).parent)
    return next((str(p) for p in places if (p / "cuobjdump").exists() and (p / "nvdisasm").exists()), None)


def read(objects: Iterable[Path], tools: str, jobs: int) -> list[Kernel]:
    """The kernels in object files, for every GPU of their machine code. ``jobs`` disassemblers run at once."""

    def output(*command: str, folder: str | None = None, text: str | None = None) -> str:
        return subprocess.run(command, cwd=folder, input=text, capture_output=True, text=True, check=True).stdout

    def read_one(cubin: Path) -> list[Kernel]:
        match = re.search(r"\.(sm_\w+)\.cubin$", cubin.name)
        assert match is not None, f"expected the name of a GPU in {cubin.name}"
        resources = output(f"{tools}/cuobjdump", "--dump-resource-usage", str(cubin))
        mangled = re.findall(r"Function (\S+):", resources)
        names = output("c++filt", text="\n".join(mangled)).splitlines()
        short = [re.sub(r"^void |\(.*$|bnfused::|\(anonymous namespace\)::", "", name) for name in names]
        command = [f"{tools}/nvdisasm", "-c", "-hex", str(cubin)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as listing:
            assert listing.stdout is not None
            kernels = parse(match[1], resources, listing.stdout, dict(zip(mangled, short, strict=True)))
        assert listing.returncode == 0, f"nvdisasm failed on {cubin.name}"
        return kernels

    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for path in objects:
            output(f"{tools}/cuobjdump", "-xelf", "all", str(path.resolve()), folder=folder)
        cubins = sorted(Path(folder).glob("*.cubin"))
        return [kernel for kernels in pool.map(read_one, cubins) for kernel in kernels]
