"""What the batch norms of a network move on a GPU, by the planner's model: ``python benchmarks/traffic.py``.

Nothing is measured and no GPU is needed. bnfused's bytes and launches are those of the plan that its launches use
(csrc/plan.h), for a GPU whose limits are known (``bnfused.explanation.DEVICES``). Torch's and Apex's are counted from
their sources: every op reads its inputs and writes its output, and Apex's persistent kernels (contrib/groupbn) keep as
many pixels as they have registers and shared memory for. A time is bytes at the bandwidth of the data sheet, and a
launch costs LAUNCH_SECONDS. Bytes that the L2 cache serves are counted for everybody, and the time that blocks wait for
each other, in clusters or through memory, is not counted.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

import bnfused
from benchmarks import pictures
from bnfused.explanation import DEVICES, DeviceLimits, Explanation, Pass

LAUNCH_SECONDS = 2.5e-6
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
PLAIN, RELU, ADD_RELU = "plain", "ReLU", "add, ReLU"
FUSIONS = (PLAIN, RELU, ADD_RELU)


@dataclass(frozen=True)
class Layer:
    """``count`` batch norms of this size in a network, with what is fused into them."""

    channels: int
    size: int  # height and width
    fusion: str
    count: int = 1

    def shape(self, batch: int) -> tuple[int, int, int, int]:
        return batch, self.channels, self.size, self.size


@dataclass(frozen=True)
class Cost:
    """What a forward and its backward move and launch, together."""

    bytes: float
    launches: int

    def seconds(self, device: DeviceLimits) -> float:
        assert device.bandwidth is not None
        return self.bytes / device.bandwidth + self.launches * LAUNCH_SECONDS


def resnet50() -> Iterator[Layer]:
    yield Layer(64, 112, RELU)
    for width, size, blocks in ((64, 56, 3), (128, 28, 4), (256, 14, 6), (512, 7, 3)):
        # torchvision's: the stride is in the 3 x 3 convolution, so that a stage's first 1 x 1 has the larger size.
        first = size if width == 64 else 2 * size
        yield Layer(width, first, RELU)
        yield Layer(width, size, RELU, 2 * blocks - 1)
        yield Layer(4 * width, size, PLAIN)
        yield Layer(4 * width, size, ADD_RELU, blocks)


def mobilenet_v2() -> Iterator[Layer]:
    """ReLU6 moves what ReLU does; the addition stands behind a batch norm without an activation, and is not counted."""
    yield Layer(32, 112, RELU, 2)
    yield Layer(16, 112, PLAIN)
    channels, size = 16, 112
    for out, blocks, stride in ((24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1)):
        for block in range(blocks):
            yield Layer(6 * channels, size, RELU)
            size //= stride if block == 0 else 1
            yield Layer(6 * channels, size, RELU)
            yield Layer(out, size, PLAIN)
            channels = out
    yield Layer(1280, 7, RELU)


def densenet121() -> Iterator[Layer]:
    yield Layer(64, 112, RELU)
    channels = 64
    for size, layers in ((56, 6), (28, 12), (14, 24), (7, 16)):
        for _ in range(layers):
            yield Layer(channels, size, RELU)
            yield Layer(128, size, RELU)
            channels += 32
        yield Layer(channels, size, RELU)
        channels //= 2 if size > 7 else 1


def unet() -> Iterator[Layer]:
    """For images of 256 x 256, with two convolutions at each level, on the way down and on the way up."""
    for level in range(5):
        yield Layer(64 << level, 256 >> level, RELU, 2 if level == 4 else 4)


NETWORKS = {"ResNet-50": resnet50, "MobileNetV2": mobilenet_v2, "DenseNet-121": densenet121, "U-Net": unet}


def plan_of(layer: Layer, batch: int, layout: str, device: DeviceLimits) -> Explanation:
    return bnfused.explain(
        layer.shape(batch),
        dtype=torch.bfloat16,
        memory_format=LAYOUTS[layout],
        residual=layer.fusion == ADD_RELU,
        activation=None if layer.fusion == PLAIN else "relu",
        device_limits=device,
    )


def ours(it: Explanation) -> Cost:
    assert it.backward is not None
    passes = it.forward, it.backward
    return Cost(sum(p.bytes_read + p.bytes_written for p in passes), sum(len(p.launches) for p in passes))


# Passes over the activation, forward and backward, of F.batch_norm, add_ and relu_; launches with the counter's.
OF_TORCH = {PLAIN: (3, 5), RELU: (5, 8), ADD_RELU: (8, 8)}
LAUNCHES_OF_TORCH = {"NCHW": (4, 1), "channels_last": (5, 3)}


def torchs(layer: Layer, batch: int, layout: str) -> Cost:
    size = 2 * batch * layer.channels * layer.size**2
    more = {PLAIN: 0, RELU: 2, ADD_RELU: 3}[layer.fusion]
    return Cost(sum(OF_TORCH[layer.fusion]) * size, sum(LAUNCHES_OF_TORCH[layout]) + more)


def apexs(layer: Layer, batch: int, device: DeviceLimits) -> Cost:
    """Channels_last and float16 only; a bit of mask for each value wherever there is a ReLU."""
    size = 2 * batch * layer.channels * layer.size**2
    blocks, pixels = 2 * device.sm_count - 12, batch * layer.size**2
    read_again = 1 - min(1, 480 * blocks / pixels) + 2 * (1 - min(1, 256 * blocks / pixels))
    mask = 0 if layer.fusion == PLAIN else 2 / 16
    residual = 2 if layer.fusion == ADD_RELU else 0
    return Cost((5 + read_again + residual + mask) * size, 2)


def total(costs: list[tuple[int, Cost]]) -> Cost:
    return Cost(sum(n * cost.bytes for n, cost in costs), sum(n * cost.launches for n, cost in costs))


def strategy_of(it: Pass) -> str:
    in_clusters = any(launch.cluster > 1 for launch in it.launches)
    return f"{it.strategy} in clusters" if in_clusters else it.strategy


def print_networks(batches: list[int], devices: list[str]) -> None:
    print("\n| network | batch | GPU | layout | strategies | launches | bnfused | torch | Apex | predicted speed-up |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, batch, key, layout in itertools.product(NETWORKS, batches, devices, LAYOUTS):
        device, layers = DEVICES[key], list(NETWORKS[name]())
        plans = [(layer, plan_of(layer, batch, layout, device)) for layer in layers]
        own = total([(layer.count, ours(it)) for layer, it in plans])
        peer = total([(layer.count, torchs(layer, batch, layout)) for layer in layers])
        apex = total([(layer.count, apexs(layer, batch, device)) for layer in layers])
        strategies: Counter[str] = Counter()
        for layer, it in plans:
            strategies[strategy_of(it.forward)] += layer.count
        chosen = ", ".join(f"{count} {strategy}" for strategy, count in sorted(strategies.items()))
        print(
            f"| {name} | {batch} | {device.name} | {layout} | {chosen} | {own.launches} "
            f"| {own.bytes / 1e9:.3g} GB | {peer.bytes / 1e9:.3g} GB "
            f"| {f'{apex.bytes / 1e9:.3g} GB' if layout == 'channels_last' else '-'} "
            f"| {peer.seconds(device) / own.seconds(device):.2f} |"
        )


def print_layers(network: str, batch: int, device: DeviceLimits, layout: str) -> None:
    print(f"\n{network}, batch {batch}, bfloat16 {layout}, {device.name}; passes over the activation, predicted time\n")
    print("| layer | fused | forward | backward | bnfused | torch | Apex | bnfused | torch |")
    print("|---|---|---|---|---|---|---|---|---|")
    for layer in NETWORKS[network]():
        it, size = plan_of(layer, batch, layout, device), 2 * batch * layer.channels * layer.size**2
        assert it.backward is not None
        own, peer, apex = ours(it), torchs(layer, batch, layout), apexs(layer, batch, device)
        size_text = f"{layer.count} x {layer.channels} x {layer.size} x {layer.size}"
        print(
            f"| {size_text} | {layer.fusion} | {strategy_of(it.forward)} "
            f"| {strategy_of(it.backward)} | {own.bytes / size:.2f}A | {peer.bytes / size:.2f}A "
            f"| {f'{apex.bytes / size:.2f}A' if layout == 'channels_last' else '-'} "
            f"| {own.seconds(device) * 1e6:.0f} us | {peer.seconds(device) * 1e6:.0f} us |"
        )


def curves(device: DeviceLimits) -> dict[str, list[pictures.Curve]]:
    """By fusion: the predicted speed-up over eager torch against the megabytes of an activation, batch 1 to 2,048."""
    by_fusion: dict[str, list[pictures.Curve]] = {}
    sizes = (64, 112), (256, 56), (512, 28), (2048, 7)
    for fusion, (channels, size), layout in itertools.product(FUSIONS, sizes, LAYOUTS):
        layer = Layer(channels, size, fusion)
        points = []
        for batch in (2**n for n in range(12)):
            own = ours(plan_of(layer, batch, layout, device)).seconds(device)
            megabytes = 2 * batch * channels * size**2 / 1e6
            points.append((megabytes, torchs(layer, batch, layout).seconds(device) / own))
        name = f"{channels} x {size} x {size}, {layout}"
        by_fusion.setdefault(fusion, []).append(pictures.Curve(name, points))
    return by_fusion


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 128, 512], metavar="N")
    parser.add_argument("--device", nargs="+", choices=sorted(DEVICES), default=["h100"])
    parser.add_argument("--network", choices=sorted(NETWORKS), help="its layers, one by one, at the first batch")
    parser.add_argument("--picture", type=Path, help="also draw the speed-up against size, of the first device")
    options = parser.parse_args()
    if options.network:
        for layout in LAYOUTS:
            print_layers(options.network, options.batch[0], DEVICES[options.device[0]], layout)
    else:
        print_networks(options.batch, options.device)
    if options.picture:
        device = DEVICES[options.device[0]]
        title = f"A model, not a measurement: forward and backward in bfloat16 on {device.name}"
        pictures.save_predictions(curves(device), title, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
