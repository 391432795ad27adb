"""bnfused on a GPU against its peers: ``python benchmarks/gpu.py``, or ``make gpu`` with build and tests before it.

Peers are torch's native kernels, cuDNN, and torch.compile, on the batch norm layers of known networks; beside them a
copy of the same tensor. Times are CUDA events around one call, L2 cold, the queue filled ahead, so that they are the
GPU's and not the launching CPU's. benchmarks/README.md says what that does and does not show. Results are written
after every tensor: a run that is cut off tells what it has measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import bench
from benchmarks.cases import FUSION_LABELS, FUSIONS, Configuration, bytes_moved
from benchmarks.report import backend_line, describe_environment
from benchmarks.timing import band, geometric_mean, paired_ratios

FORMAT = 1
PASSES = ("forward", "forward+backward")
DTYPES = ("bfloat16", "float16", "float32")
OURS = "bnfused"
PEERS = ("torch native", "cuDNN", "compile", "compile max-autotune")
# max-autotune by itself also makes CUDA graphs, whose copies of the inputs would be timed with it.
COMPILE_MODES = {"compile": "default", "compile max-autotune": "max-autotune-no-cudagraphs"}
COPY = "copy"

ROUNDS = 15
FEWEST_ROUNDS = 5
# Cycles that the GPU waits before a sample, while the CPU queues it: 0.5 ms at 2 GHz. To queue an eager forward and
# backward takes a CPU 0.1 to 0.2 ms.
HEAD_START = 1_000_000


@dataclass(frozen=True)
class Layer:
    """The input of one batch norm layer; ``compiled``: compared with torch.compile too, which takes seconds each."""

    network: str
    shape: tuple[int, ...]
    compiled: bool = False


LAYERS = (
    Layer("ResNet-50", (256, 64, 112, 112)),
    Layer("ResNet-50", (256, 64, 56, 56)),
    Layer("ResNet-50", (256, 256, 56, 56), compiled=True),
    Layer("ResNet-50", (256, 128, 28, 28)),
    Layer("ResNet-50", (256, 512, 28, 28)),
    Layer("ResNet-50", (256, 1024, 14, 14)),
    Layer("ResNet-50", (256, 2048, 7, 7), compiled=True),
    Layer("MobileNetV2", (256, 96, 112, 112)),
    Layer("MobileNetV2", (256, 144, 56, 56), compiled=True),
    Layer("MobileNetV2", (256, 384, 14, 14)),
    Layer("MobileNetV2", (256, 960, 7, 7)),
    Layer("DenseNet-121", (128, 96, 56, 56)),
    Layer("DenseNet-121", (128, 320, 28, 28), compiled=True),
    Layer("DenseNet-121", (128, 672, 14, 14)),
    Layer("DenseNet-121", (128, 992, 7, 7)),
    Layer("U-Net", (16, 64, 256, 256), compiled=True),
    Layer("U-Net", (16, 256, 64, 64)),
    Layer("U-Net", (16, 512, 32, 32)),
    Layer("MLP", (64, 256)),
    Layer("MLP", (4096, 1024), compiled=True),
    Layer("MLP", (65536, 256)),
    Layer("MLP", (16384, 4096)),
)


def tiny(layer: Layer) -> Layer:
    """The same kind of layer, small enough to try this script on a CPU."""
    return replace(layer, shape=(2, min(layer.shape[1], 6), *(min(size, 4) for size in layer.shape[2:])))


@dataclass(frozen=True)
class Input:
    """What is measured together, on the same buffers: a layer's input in one layout and dtype."""

    layer: Layer
    layout: str
    dtype: str

    @property
    def configuration(self) -> Configuration:
        return Configuration(self.layer.shape, self.layout, self.dtype, self.layer.network, PASSES)

    @property
    def name(self) -> str:
        return f"{self.layer.network} {self.configuration.name}"


def inputs(layers: Sequence[Layer], dtypes: Sequence[str]) -> Iterator[Input]:
    """In the order in which they are measured: what is most used comes first, in case the time does not suffice."""
    for dtype in dtypes:
        for layer in layers:
            layouts = ("channels_last", "NCHW") if len(layer.shape) == 4 else ("NC",)
            for layout in layouts:
                yield Input(layer, layout, dtype)


# --- the peers ---


def call(peer: str, tensors: bench.Tensors, fusion: str) -> Tensor:
    """The forward of ``peer``, eagerly. torch's choice between its kernels and cuDNN is a switch of the process."""
    if peer == OURS:
        return bench.batch_norm("bnfused", tensors, tensors.x, True, fusion)
    # Not by assignment, which torch.testing forbids for the rest of a process that has imported it.
    torch.backends.cudnn.set_flags(_enabled=peer == "cuDNN")
    return bench.batch_norm("torch", tensors, tensors.x, True, fusion)


def takes_cudnn(tensors: bench.Tensors) -> bool:
    """Whether torch gives this tensor to cuDNN where it may: not every dtype, layout and version."""
    select = getattr(torch._C, "_select_batch_norm_backend", None)
    if not tensors.x.is_cuda or select is None:
        return False
    torch.backends.cudnn.set_flags(_enabled=True)
    mean, var = tensors.statistics["torch"]
    chosen = select(tensors.x, tensors.weight, tensors.bias, mean, var, True, bench.EPS)
    return bool(chosen == torch._C._BatchNormBackend.Cudnn)


def compiled_peer(peer: str, tensors: bench.Tensors, fusion: str) -> Callable[[], Tensor]:
    """The unfused forward, given to torch.compile: it fuses the add and the ReLU itself."""
    torch._dynamo.reset()  # else what was compiled before counts, and at the limit it runs eagerly without a word
    mean, var = tensors.statistics["torch"]
    batch_norm, relu = torch.nn.functional.batch_norm, torch.nn.functional.relu

    def forward(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = batch_norm(x, mean, var, weight, bias, True, bench.MOMENTUM, bench.EPS)
        if fusion == "add_relu":
            y = y + residual
        return y if fusion == "plain" else relu(y)

    run = torch.compile(forward, fullgraph=True, dynamic=False, mode=COMPILE_MODES[peer])
    return lambda: run(tensors.x, tensors.residual, tensors.weight, tensors.bias)


def pass_function(
    forward: Callable[[], Tensor], pass_name: str, fusion: str, tensors: bench.Tensors
) -> Callable[[], object]:
    """What is timed: the forward with its graph, or that and the gradients. Outputs are allocated inside."""
    if pass_name == "forward":
        return forward
    return lambda: bench.gradients(tensors, forward(), fusion, retain=False)


# --- the clock ---


class Clock:
    """Times calls: by CUDA events on a GPU, by the wall clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.gpu = device.type == "cuda"
        if self.gpu:
            size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
            self.flushed = torch.empty(size, dtype=torch.uint8, device=device)

    def round(self, functions: Mapping[Any, Callable[[], object]], order: Sequence[Any]) -> dict[Any, float]:
        """Microseconds of one call of each, called in ``order``."""
        if not self.gpu:
            times = {}
            for name in order:
                begin = time.perf_counter()
                functions[name]()
                times[name] = 1e6 * (time.perf_counter() - begin)
            return times
        events = {}
        for name in order:
            events[name] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self.flushed.zero_()
            torch.cuda._sleep(HEAD_START)
            events[name][0].record()
            functions[name]()
            events[name][1].record()
        torch.cuda.synchronize()
        return {name: 1e3 * begin.elapsed_time(end) for name, (begin, end) in events.items()}


def sample(
    functions: Mapping[Any, Callable[[], object]], clock: Clock, rounds: int, seconds: float
) -> dict[Any, list[float]]:
    """Every function once per round, in another order each time, so that drift of the clocks hits all alike."""
    samples: dict[Any, list[float]] = {name: [] for name in functions}
    order = list(functions)
    generator = random.Random(0)
    clock.round(functions, order)  # warm-up: the allocator, cuDNN's choice, compilation
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= FEWEST_ROUNDS and time.perf_counter() - begin > seconds:
            break
        generator.shuffle(order)
        for name, microseconds in clock.round(functions, order).items():
            samples[name].append(microseconds)
    return samples


# --- results ---


def row(what: Input, pass_name: str, fusion: str, samples: Mapping[Any, Sequence[float]]) -> dict[str, Any]:
    """One cell: quartiles in microseconds, peers' times over ours, and speed relative to the copy, by peer."""
    times = {name[0]: values for name, values in samples.items() if name[1:] == (pass_name, fusion)}
    configuration = what.configuration
    scale = bytes_moved(pass_name, fusion, configuration.activation_bytes) / (2 * configuration.activation_bytes)
    of_copy = {name: band(paired_ratios(samples[COPY], values)) for name, values in times.items()}
    return {
        "network": what.layer.network,
        "configuration": configuration.name,
        "layout": what.layout,
        "dtype": what.dtype,
        "pass": pass_name,
        "fusion": fusion,
        "microseconds": {name: band(values) for name, values in times.items()},
        "ratio": {name: band(paired_ratios(values, times[OURS])) for name, values in times.items() if name != OURS},
        "of_copy_speed": {name: value.median * scale for name, value in of_copy.items() if value is not None},
    }


def cell_name(result: Mapping[str, Any]) -> str:
    return f"{result['network']} {result['configuration']} {result['pass']} {FUSION_LABELS[result['fusion']]}"


@dataclass(frozen=True)
class Summary:
    """Peers' times over ours in one group of cells: above 1, bnfused is faster."""

    peer: str
    pass_name: str
    fusion: str
    layout: str
    ratios: tuple[float, ...]
    worst: str

    @property
    def label(self) -> str:
        return f"{self.pass_name} {FUSION_LABELS[self.fusion]} {self.layout}"


def summarize(results: Sequence[Mapping[str, Any]]) -> list[Summary]:
    """By peer, pass, fusion and layout, in that order; groups without cells are left out."""
    groups: dict[tuple[str, str, str, str], list[tuple[float, str]]] = {}
    for result in results:
        for peer, ratio in result["ratio"].items():
            if ratio is not None:
                key = (peer, result["pass"], result["fusion"], result["layout"])
                groups.setdefault(key, []).append((ratio[1], cell_name(result)))
    rank = {name: number for number, name in enumerate((*PEERS, *PASSES, *FUSIONS))}
    ordered = sorted(groups, key=lambda key: (*(rank[part] for part in key[:3]), key[3]))
    return [Summary(*key, tuple(ratio for ratio, _ in groups[key]), min(groups[key])[1]) for key in ordered]


def closing_lines(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of geometric means, then all cells of each peer and the worst of them."""
    summaries = summarize(results)
    if not summaries:
        return ["nothing was measured"]
    lines = [f"{'time of the peer / time of bnfused':52s} {'cells':>5s} {'geomean':>8s} {'worst':>6s}  worst cell"]
    for s in summaries:
        label = f"{s.peer}: {s.label}"
        worst = min(s.ratios)
        lines.append(f"{label:52s} {len(s.ratios):5d} {geometric_mean(s.ratios):8.2f} {worst:6.2f}  {s.worst}")
    for peer in dict.fromkeys(s.peer for s in summaries):
        of_peer = [s for s in summaries if s.peer == peer]
        ratios = [ratio for s in of_peer for ratio in s.ratios]
        worst = min(of_peer, key=lambda s: min(s.ratios))
        lines.append(
            f"{peer}, all {len(ratios)} cells: geometric mean {geometric_mean(ratios):.2f}, "
            f"worst {min(ratios):.2f}: {worst.worst}"
        )
    return lines


def save_picture(run: Mapping[str, Any], path: Path) -> None:
    """Left the ratio to each peer, right the fraction of the copy's speed: dots are cells, diamonds geometric means."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    summaries = summarize(run["results"])
    labels = list(dict.fromkeys(s.label for s in summaries))
    peers = list(dict.fromkeys(s.peer for s in summaries))
    speeds: dict[tuple[str, str], list[float]] = {}
    for result in run["results"]:
        label = f"{result['pass']} {FUSION_LABELS[result['fusion']]} {result['layout']}"
        for name, value in result["of_copy_speed"].items():
            speeds.setdefault((name, label), []).append(value)
    figure, (left, right) = pyplot.subplots(
        1, 2, sharey=True, figsize=(14, 2 + 0.45 * len(labels)), layout="constrained"
    )
    for index, name in enumerate([OURS, *peers]):
        colour = "black" if name == OURS else f"C{index - 1}"
        offset = 0.7 * ((index + 0.5) / (len(peers) + 1) - 0.5)
        for position, label in enumerate(labels):
            values = {
                left: [ratio for s in summaries if (s.peer, s.label) == (name, label) for ratio in s.ratios],
                right: speeds.get((name, label), []),
            }
            for axes, cells in values.items():
                if cells:
                    y = position + offset
                    axes.plot(cells, [y] * len(cells), "o", ms=3, c=colour, alpha=0.4)
                    axes.plot(geometric_mean(cells), y, "D", ms=6, c=colour, mec="black", mew=0.8)
        right.plot([], [], "D", c=colour, mec="black", label=name)
    left.axvline(1.0, color="grey", lw=1)
    left.set_xscale("log")
    low, high = left.get_xlim()
    ticks = [tick for tick in (0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 10, 20, 50) if low <= tick <= high] or [1]
    left.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    left.minorticks_off()
    left.set_yticks(range(len(labels)), labels, fontsize=8)
    left.set_ylim(len(labels) - 0.5, -0.5)
    left.set_xlabel("time of the peer / time of bnfused (right of 1x: bnfused is faster)")
    right.set_xlabel("speed, of that of a copy (every tensor counted once)")
    right.set_xlim(left=0)
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(peers) + 1, fontsize=9)
    environment = run["environment"]
    figure.suptitle(
        f"{environment['device']}, torch {environment['torch']}, CUDA {environment['cuda']}, "
        f"bnfused {environment['bnfused']} (commit {environment['commit'] or 'unknown'}), {environment['date']}",
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# --- the run ---


def describe(device: torch.device) -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    environment = describe_environment() | {"device": environment_name(device), "cuda": torch.version.cuda}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        environment |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_GiB": round(properties.total_memory / 2**30, 1),
            "L2_MiB": round(properties.L2_cache_size / 2**20, 1),
            "cudnn": torch.backends.cudnn.version(),
            "driver": driver(),
        }
    return environment


def environment_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def copy_bandwidth(device: torch.device, clock: Clock, size: int) -> float:
    """Bytes read and written per second by a copy of ``size`` bytes."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    samples = sample({COPY: lambda: target.copy_(source)}, clock, ROUNDS, 1.0)
    return 2 * size / (sorted(samples[COPY])[len(samples[COPY]) // 2] * 1e-6)


def measure_eager(what: Input, options: argparse.Namespace, clock: Clock) -> list[dict[str, Any]]:
    """bnfused, torch's own kernels and cuDNN on one tensor, all passes and fusions. ValueError where they differ."""
    tensors = bench.Tensors(what.configuration, options.device, seed=0)
    torch.backends.cudnn.set_flags(_enabled=False)
    bench.check_agreement(what.configuration, what.configuration.cells(threads=1), tensors)
    peers = [OURS, "torch native", *(["cuDNN"] if takes_cudnn(tensors) else [])]
    functions: dict[Any, Callable[[], object]] = {COPY: lambda: tensors.copy.copy_(tensors.x.detach())}
    for peer in peers:
        for fusion in FUSIONS:

            def forward(peer: str = peer, fusion: str = fusion) -> Tensor:
                return call(peer, tensors, fusion)

            for pass_name in PASSES:
                functions[peer, pass_name, fusion] = pass_function(forward, pass_name, fusion, tensors)
    samples = sample(functions, clock, options.rounds, options.seconds)
    return [row(what, pass_name, fusion, samples) for pass_name in PASSES for fusion in FUSIONS]


def measure_compiled(
    what: Input, peer: str, fusion: str, options: argparse.Namespace, clock: Clock
) -> list[dict[str, Any]]:
    """bnfused and one mode of torch.compile, on one tensor and fusion."""
    tensors = bench.Tensors(what.configuration, options.device, seed=0)
    torch.backends.cudnn.set_flags(_enabled=True)
    theirs = compiled_peer(peer, tensors, fusion)
    functions: dict[Any, Callable[[], object]] = {COPY: lambda: tensors.copy.copy_(tensors.x.detach())}
    for pass_name in PASSES:
        functions[peer, pass_name, fusion] = pass_function(theirs, pass_name, fusion, tensors)
        functions[OURS, pass_name, fusion] = pass_function(
            lambda: call(OURS, tensors, fusion), pass_name, fusion, tensors
        )
    samples = sample(functions, clock, options.rounds, options.seconds)
    return [row(what, pass_name, fusion, samples) for pass_name in PASSES]


def show(results: Sequence[Mapping[str, Any]]) -> None:
    for result in results:
        ours = result["microseconds"][OURS]
        speed = result["of_copy_speed"][OURS]
        ratios = ", ".join(f"{peer} {ratio[1]:.2f}x" for peer, ratio in result["ratio"].items() if ratio is not None)
        print(f"{cell_name(result):78s} {ours[1]:9.1f} us, {speed:4.0%} of copy; {ratios}", flush=True)


def work(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[Clock], list[dict[str, Any]]]]]:
    """Every measurement, by name, in order: all eager ones, then torch.compile."""
    layers = [tiny(layer) for layer in LAYERS] if options.tiny else list(LAYERS)
    tensors = [what for what in inputs(layers, options.dtypes) if re.search(options.filter, what.name)]
    for what in tensors:
        yield what.name, lambda clock, what=what: measure_eager(what, options, clock)
    for what in tensors if options.compile else ():
        for peer in COMPILE_MODES if what.layer.compiled else ():
            for fusion in FUSIONS:
                name = f"{what.name} {peer} {fusion}"
                yield name, lambda clock, a=(what, peer, fusion): measure_compiled(*a, options, clock)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu.py", description="Time bnfused on a GPU against its peers.")
    parser.add_argument("--device", default="cuda", type=torch.device, help="default: %(default)s")
    parser.add_argument("--dtypes", default=",".join(DTYPES), type=bench.parse_dtypes, help="default: %(default)s")
    parser.add_argument("--filter", default="", metavar="REGEX", help="only tensors whose name matches")
    parser.add_argument("--tiny", action="store_true", help="shapes of a few values, to try the script")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="samples of each function (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.5, help="limit for a tensor (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=210.0, help="seconds for everything (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder (default: benchmarks/results/<device>)")
    options = parser.parse_args(arguments)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is visible to torch")
    if options.out is None:
        slug = re.sub(r"[^a-z0-9]+", "-", environment_name(options.device).lower()).strip("-")
        options.out = Path(__file__).resolve().parent / "results" / slug
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    begin = time.perf_counter()
    clock = Clock(options.device)
    run: dict[str, Any] = {
        "format": FORMAT,
        "environment": describe(options.device),
        "settings": {name: str(value) for name, value in vars(options).items() if name != "out"},
        "copy_GB_s": copy_bandwidth(options.device, clock, 2**20 if options.tiny else 2**30) / 1e9,
        "results": [],
        "wrong": [],
        "not_measured": [],
    }
    print(json.dumps(run["environment"], indent=1))
    print(backend_line())
    print(f"a copy moves {run['copy_GB_s']:.0f} GB/s, counting bytes read and written", flush=True)
    numbers = options.out / "gpu.json"
    options.out.mkdir(parents=True, exist_ok=True)
    cudnn = torch.backends.cudnn.enabled
    interrupted = False
    for name, measure in work(options):
        if interrupted or time.perf_counter() - begin > options.limit:
            run["not_measured"].append(name)
            continue
        try:
            results = measure(clock)
        except KeyboardInterrupt:
            interrupted = True
            run["not_measured"].append(name)
            continue
        except Exception as error:  # a peer that cannot do a case is a result, and the rest is worth having
            run["wrong"].append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:300]}")
            print(f"FAILED {run['wrong'][-1]}", flush=True)
            continue
        show(results)
        run["results"] += results
        numbers.write_text(json.dumps(run, indent=1) + "\n")
    torch.backends.cudnn.set_flags(_enabled=cudnn)
    numbers.write_text(json.dumps(run, indent=1) + "\n")
    if run["results"] and importlib.util.find_spec("matplotlib"):
        save_picture(run, options.out / "gpu.png")
    if run["not_measured"]:
        print(f"\n{len(run['not_measured'])} measurements were left out for lack of time; {numbers} names them")
    for message in run["wrong"]:
        print(f"FAILED {message}")
    print("\n" + "\n".join(closing_lines(run["results"])))
    print(f"{time.perf_counter() - begin:.0f} s; numbers and picture: {options.out}")
    return 1 if run["wrong"] or not run["results"] else 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
