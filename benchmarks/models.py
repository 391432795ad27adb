"""The networks that are converted and timed, as their papers and torchvision have them, written for torch.nn alone.

Initial values are those of torch.nn's layers. ``forward`` takes images (N, 3, H, W) to logits (N, classes).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def convolution(channels_in: int, channels: int, size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """As it stands before a batch norm: without bias, and of the same size for stride 1."""
    return nn.Conv2d(channels_in, channels, size, stride, padding=size // 2, groups=groups, bias=False)


# --- He et al., "Deep Residual Learning for Image Recognition", 2015, table 1 ---


def shortcut(channels_in: int, channels: int, stride: int) -> nn.Module | None:
    """Where the shape changes, a convolution; None for the identity."""
    if stride == 1 and channels_in == channels:
        return None
    return nn.Sequential(convolution(channels_in, channels, 1, stride), nn.BatchNorm2d(channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = convolution(channels_in, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = convolution(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = shortcut(channels_in, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """A 3x3 convolution between two 1x1 ones, and a shortcut. The 3x3 one has the stride, as in torchvision."""

    expansion = 4

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = convolution(channels_in, channels, 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = convolution(channels, channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = convolution(channels, 4 * channels, 1)
        self.bn3 = nn.BatchNorm2d(4 * channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(channels_in, 4 * channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """``depths``: blocks of each of the four stages."""

    def __init__(self, block: type[BasicBlock] | type[Bottleneck], depths: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.conv1 = convolution(3, 64, 7, 2)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        blocks: list[nn.Module] = []
        channels_in = 64
        for stage, depth in enumerate(depths):
            for number in range(depth):
                stride = 2 if stage > 0 and number == 0 else 1
                blocks.append(block(channels_in, 64 * 2**stage, stride))
                channels_in = block.expansion * 64 * 2**stage
        self.layers = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.layers(x).mean((2, 3)))


def resnet18(classes: int = 1000) -> ResNet:
    return ResNet(BasicBlock, (2, 2, 2, 2), classes)


def resnet50(classes: int = 1000) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 6, 3), classes)


# --- Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018, table 2 ---


def unit(channels_in: int, channels: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = convolution(channels_in, channels, size, stride, groups)
    return [conv, nn.BatchNorm2d(channels), nn.ReLU6(inplace=True)]


class InvertedResidual(nn.Module):
    """1x1 up, 3x3 depthwise, 1x1 down; ``expansion`` 1 leaves the first out. Added to x where the shapes agree."""

    def __init__(self, channels_in: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels_in * expansion
        layers = unit(channels_in, hidden, 1) if expansion != 1 else []
        layers += unit(hidden, hidden, 3, stride, groups=hidden)
        layers += [convolution(hidden, channels, 1), nn.BatchNorm2d(channels)]
        self.conv = nn.Sequential(*layers)
        self.use_residual = stride == 1 and channels_in == channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_residual else self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        layers = unit(3, 32, 3, 2)
        channels_in = 32
        # (expansion, channels, blocks, stride of the first)
        table = (
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        )
        for expansion, channels, depth, stride in table:
            for number in range(depth):
                layers.append(InvertedResidual(channels_in, channels, stride if number == 0 else 1, expansion))
                channels_in = channels
        self.features = nn.Sequential(*layers, *unit(320, 1280, 1))
        # Without the paper's dropout: two networks are to see the same.
        self.classifier = nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


# --- Huang et al., "Densely Connected Convolutional Networks", 2017, table 1 ---


class DenseLayer(nn.Module):
    """Adds ``growth`` channels to those that it is given, from all of them. Batch norm reads the concatenation."""

    def __init__(self, channels_in: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels_in)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = convolution(channels_in, 4 * growth, 1)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = convolution(4 * growth, growth, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.relu1(self.norm1(x)))
        out = self.conv2(self.relu2(self.norm2(out)))
        return torch.cat([x, out], 1)


class DenseNet121(nn.Module):
    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        growth, channels = 32, 64
        layers: list[nn.Module] = [convolution(3, channels, 7, 2), nn.BatchNorm2d(channels)]
        layers += [nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1)]
        for depth in (6, 12, 24, 16):
            if channels != 64:  # a transition halves the channels and the size
                layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
                layers += [convolution(channels, channels // 2, 1), nn.AvgPool2d(2)]
                channels //= 2
            for _ in range(depth):
                layers.append(DenseLayer(channels, growth))
                channels += growth
        layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))
