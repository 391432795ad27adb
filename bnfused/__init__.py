"""Batch norm for PyTorch in fused kernels: drop-in modules, with the ReLU and the residual add fused in.

``bnfused.BatchNorm2d`` can replace ``torch.nn.BatchNorm2d`` anywhere; ``bnfused.functional.batch_norm`` is the function
behind it. ``bnfused.reference.batch_norm`` is the specification in plain torch.
"""

from bnfused import autograd, diagnostics, functional, parts, reference, sync
from bnfused._extension import build_info, is_available, why_unavailable
from bnfused.conversion import FusionEntry, FusionReport, convert, fusion_report, revert
from bnfused.explanation import explain
from bnfused.modules import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
)
from bnfused.sync import SyncBatchNorm

__version__ = "0.1.0"

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "FusionEntry",
    "FusionReport",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "SyncBatchNorm",
    "autograd",
    "build_info",
    "convert",
    "diagnostics",
    "explain",
    "functional",
    "fusion_report",
    "is_available",
    "parts",
    "reference",
    "revert",
    "sync",
    "why_unavailable",
]
