"""scikit-learn's handwritten digits: what the training scripts train on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

TEST_IMAGES = 360


@dataclass
class Digits:
    """Images (n, 1, size, size) channels_last, grey values from -0.3 to 0.7, and labels (n,)."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits(dtype: torch.dtype, size: int) -> Digits:
    """All 1797 digits, the same 360 of them for testing in every run, enlarged from 8x8 to ``size`` x ``size``."""
    from sklearn import datasets

    digits = datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float64)[:, None] / 16 - 0.3
    images = F.interpolate(images, size=(size, size), mode="bilinear")
    images = images.to(dtype).contiguous(memory_format=torch.channels_last)
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[:TEST_IMAGES], order[TEST_IMAGES:]
    return Digits(images[train], labels[train], images[test], labels[test])
