"""Checks a build with CUDA on any machine: it imports, its CPU ops are right, CUDA tensors would find the kernels.

It runs in the folder of the build, with the package in lib/.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.nn import functional as F

import bnfused
from bnfused import _extension


def main() -> int:
    built = Path.cwd() / "lib" / "bnfused"
    assert Path(bnfused.__file__).parent == built, f"expected the package of {built}, got {bnfused.__file__}"
    assert bnfused.is_available(), bnfused.why_unavailable()
    info = bnfused.build_info()
    assert info["cuda"] and info["cuda_archs"], f"expected a build with CUDA, got {info}"

    x = torch.randn(4, 8, 5, 5, requires_grad=True)
    ours = bnfused.functional.batch_norm(x, None, None, training=True, activation="relu")
    torch.testing.assert_close(ours, F.relu(F.batch_norm(x, None, None, training=True)))
    ours.sum().backward()

    for op in _extension.OPS:
        where = torch._C._dispatch_dump(f"bnfused::{op}")
        registered = next((line for line in where.splitlines() if line.startswith("CUDA:")), "no kernel")
        assert "cuda.cpp" in registered, f"expected {op} on CUDA from csrc/ops/cuda.cpp, got {registered}"
    archs = ", ".join(info["cuda_archs"])
    print(f"torch {torch.__version__}: imported, CPU ops are right; CUDA {info['cuda']} kernels for {archs}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
