"""The kernels of every instruction set that this machine has: torch's ATEN_CPU_CAPABILITY limits what is chosen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bnfused

ROOT = Path(__file__).resolve().parents[2]

# Every loop of the leaves: layouts, remainders, dtypes, activations, masks, sums, streaming.
SELECTION = (
    "test_values_and_gradients or test_layouts or test_channel_counts or test_spatial_sizes or test_row_counts "
    "or test_activations or test_ties or test_relu_mask or test_16_bit or test_empty or test_outputs_past "
    "or test_groups "
    "or (test_float32 and not torch) or test_constant or test_nonfinite or test_nan or test_extreme"
)


def chosen(limit: str) -> str:
    """The instruction set that the kernels run with under this limit."""
    return subprocess.run(
        [sys.executable, "-c", "import bnfused; print(bnfused.build_info()['cpu_capability'])"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "ATEN_CPU_CAPABILITY": limit},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("limit", ["default", "avx2"])
def test_kernels_of_lesser_instruction_sets(limit):
    """The tests of the kernels, on the baseline and on AVX2."""
    own = torch.backends.cpu.get_cpu_capability()
    if limit == "avx2" and own not in ("AVX2", "AVX512"):
        pytest.skip(f"this machine has no AVX2, it has {own}")
    if "ATEN_CPU_CAPABILITY" in os.environ:
        pytest.skip("ATEN_CPU_CAPABILITY is set, so this run is already one instruction set's")
    assert chosen(limit) != bnfused.build_info()["cpu_capability"] or own.lower() == limit
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--no-header", "--tb=short"]
        + ["tests/package/test_functional.py", "tests/package/test_numerics.py"]
        + ["-k", f"not reference and not emulated and ({SELECTION})"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "ATEN_CPU_CAPABILITY": limit},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-6000:]
    print(result.stdout.splitlines()[-1])
