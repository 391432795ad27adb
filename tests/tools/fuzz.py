"""Random calls against torch, guided by the code that they reach: ``make fuzz``, or ``python -m tools.fuzz`` in tests/.

A call is decoded from a string of bytes. If a string reaches a basic block that no string before it has reached, it is
kept and mutated further. Only the build of instrumented.py counts blocks; with another build, every call is a fresh
one. In each call, either both ours and torch's raise, and our running statistics and counter stay; or neither raises,
and values, gradients, statistics, dtypes and strides agree with float64.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import random
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from bnfused import _extension, functional
from support import cases, checks, oracle
from support.cases import Problem

T = TypeVar("T")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
STATE = ("running_mean", "running_var", "num_batches_tracked")
# The errors that refuse a call. Any other error is a bug.
REFUSALS = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError)
# From 32768 values on, the work is split over threads. Above 32768 values of a channel, or 524 rows, there is more than
# one block (csrc/cpu/tuning.h). More values than this only take more time.
MAX_VALUES = 2**17
BYTES = 80  # about as many decisions as a call has


class Choices:
    """A string of bytes as a sequence of decisions. After its end, each decision is the first option."""

    def __init__(self, data: bytes):
        self.data = data
        self.at = 0

    def number(self, below: int) -> int:
        self.at += 1
        return self.data[self.at - 1] % below if self.at <= len(self.data) else 0

    def of(self, options: Sequence[T]) -> T:
        return options[self.number(len(options))]

    def rarely(self) -> bool:
        return self.number(16) == 15


def decode(data: bytes) -> tuple[Problem, list[str], int]:
    """The arguments of one call, most of them valid; which of them need a gradient; the number of threads."""
    c = Choices(data)
    shape = shape_of(c)
    dtype = c.of(DTYPES)
    training = c.number(2) == 0
    generator = torch.Generator().manual_seed(c.number(256))

    def values(sizes: Sequence[int], own: torch.dtype, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        x = scale * torch.randn(sizes, generator=generator, dtype=torch.float64) + shift
        if x.numel() and c.rarely():
            x.view(-1)[c.number(256) % x.numel()] = c.of((math.nan, math.inf, -math.inf, 0.0))
        return x.to(own)

    def like_x(scale: float = 1.0, shift: float = 0.0) -> Tensor:
        layout = cases.LAYOUTS[c.of(tuple(cases.LAYOUTS))]
        x = values(shape, dtype, scale, shift)
        return layout(x) if x.numel() else x

    def per_channel(*, positive: bool = False) -> Tensor | None:
        if c.number(4) == 3:
            return None
        own = c.of((cases.parameter_dtype(dtype), dtype))
        sizes = [shape[1]]
        if c.rarely():
            own = c.of((torch.float64, torch.float16, torch.int64))
        if c.rarely():
            sizes = c.of(([shape[1] + 1], [1, shape[1]], [], [0]))
        x = values(sizes, own)
        if positive:
            x = x.abs() + 0.1
        return torch.stack([x, x], -1)[..., 0] if c.rarely() else x

    count = c.of((None, torch.tensor(0), torch.tensor(41), torch.tensor([2])))
    problem = Problem(
        x=like_x(c.of((1.0, 0.01, 10.0)), c.of((0.0, 3.0, -100.0))),
        grad_y=like_x(),
        weight=per_channel(),
        bias=per_channel(),
        running_mean=per_channel(),
        running_var=per_channel(positive=True),
        num_batches_tracked=count,
        residual=like_x() if c.number(2) else None,
        training=training,
        momentum=c.of((0.1, 0.0, 1.0, None)),
        eps=c.of((0.0, -1.0)) if c.rarely() else c.of((1e-5, 1e-3, 0.6)),
        activation=(activation := c.of((None, *cases.ACTIVATIONS))),
        activation_param=cases.PARAMS.get(activation or "") if c.number(2) else None,
    )
    needs = [name for name in checks.LEAVES if c.number(4) != 3] if c.number(4) else []
    if c.rarely():
        bad = c.of((("x", 1.0), ("residual", problem.x[:1]), ("activation", "nothing"), ("weight", "text")))
        problem = problem.but(**dict([bad]))
    return problem, needs, c.of((1, 1, 1, 2))


def shape_of(c: Choices) -> list[int]:
    """Any rank. Most sides are short; sometimes one is long or empty."""
    rank = c.of((4, 3, 2, 5, 6))
    shape = [c.of((2, 3, 1, 4, 7)) for _ in range(rank)]
    shape[1] = c.of((3, 1, 2, 8, 16, 17, 33, 64, 72))
    if rank > 2:
        shape[-1] = c.of((5, 1, 2, 3, 8, 9, 16, 31))
    if c.rarely():
        shape[c.number(rank)] = c.of((525, 1049, 4097, 9000))
    if c.rarely():
        shape[c.number(rank)] = 0
    while math.prod(shape) > MAX_VALUES:
        shape[sorted(range(rank), key=shape.__getitem__)[-2]] //= 2  # the longest side was chosen on purpose
    return shape


def refusal(batch_norm: checks.BatchNorm, problem: Problem) -> Exception | None:
    """The error of a forward, or None. It must not change the statistics and the counter."""
    copies = {name: checks._copy(getattr(problem, name)) for name in STATE}
    try:
        checks.call(batch_norm, problem, **copies)
    except REFUSALS as error:
        for name, copy in copies.items():
            if batch_norm is functional.batch_norm and copy is not None:
                kept = checks.same_bits(copy, getattr(problem, name))
                assert kept, f"{name} changed although the call raised {error!r} {problem}"
        return error
    return None


def refuses_more(error: Exception) -> bool:
    """Whether torch takes such a call and ours refuses it, as docs/support.md says, with an error that says why."""
    wanted = (
        "expected residual",  # would broadcast, or promote
        "expected weight of",  # torch takes more mixtures of dtypes
        "expected bias of",
        "expected running_mean of",
        "expected running_var of",
        "when not training, got None",  # torch needs them too, except if x is empty
    )
    return any(text in str(error) for text in wanted)


def takes_more(problem: Problem, error: Exception) -> bool:
    """Whether torch refuses such a call and ours takes it: each parameter has its own dtype, or is absent."""
    texts = (
        *("mixed dtype", "expected scalar type", "needs_dynamic_casting", "must either both be None"),
        "eps must be positive, but got 0.0",  # torch 2.11, in eval too
    )
    # Without channels torch still reads the first one.
    return any(text in str(error) for text in texts) or problem.x.shape[1] == 0


def run(data: bytes) -> None:
    """One call, compared."""
    problem, needs, threads = decode(data)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compare(problem, needs)
    finally:
        torch.set_num_threads(before)


def compare(problem: Problem, needs: list[str]) -> None:
    """Raises AssertionError if ours and torch's differ."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = (refusal(f, problem) for f in (functional.batch_norm, oracle.torch_batch_norm))
    if ours is not None:
        assert theirs is not None or refuses_more(ours), f"ours raises {ours!r}, torch does not {problem}"
        return
    assert theirs is None or takes_more(problem, theirs), f"torch raises {theirs!r}, ours does not {problem}"
    problem = cases.away_from_kinks(problem)
    if all_finite(problem):
        checks.check_against_oracle(functional.batch_norm, problem, hard=True, needs=needs)
    elif theirs is None:
        check_nonfinite(problem, needs)


def all_finite(problem: Problem) -> bool:
    """Whether all arguments are finite, and all results are in the range of their dtypes."""
    tensors = [value for value in vars(problem).values() if isinstance(value, Tensor)]
    if problem.eps == 0 or not all(bool(t.isfinite().all()) for t in tensors):
        return False
    for name, value in oracle.expected(problem).values.items():
        own = problem.x if name == "y" else getattr(problem, name.removeprefix("grad_"))
        if value is not None and not bool(value.to(own.dtype).isfinite().all()):
            return False
    return True


def check_nonfinite(problem: Problem, needs: list[str]) -> None:
    """Where torch and the formula are finite, ours is within the usual limits. Where neither is, ours is not finite.

    Nothing is compared where torch's own results vary. With a parameter or a statistic that is not finite, they depend
    on the order of the operations, which depends on the layout. The derivative of an activation at a value that is not
    finite depends on whether torch computes it in a vector.
    """
    truth = oracle.expected(problem)
    ours, theirs = (checks.run(f, problem, needs).values for f in (functional.batch_norm, oracle.torch_batch_norm))
    dims = [0, *range(2, problem.x.dim())]
    settled = torch.ones(problem.x.shape, dtype=torch.bool)
    for t in (problem.weight, problem.bias, problem.running_mean, problem.running_var):
        settled &= torch.tensor(True) if t is None else oracle.per_channel(t.isfinite(), problem.x)
    differentiable = settled
    if problem.activation is not None:
        differentiable = settled & oracle.before_activation(problem).isfinite()
        if problem.training:  # sums over the channel spread it to the whole channel
            differentiable = oracle.per_channel(differentiable.all(dims), problem.x).expand_as(problem.x)
    for name, value in ours.items():
        expected = truth.values[name]
        if value is None or expected is None:
            continue
        compared = differentiable if name.startswith("grad_") else settled
        compared = compared.all(dims) if value.dim() == 1 else compared
        compared = compared & (expected.isfinite() == theirs[name].isfinite())
        limits = cases.limit(expected, truth.scales[name], value.dtype, hard=True)
        checks.assert_within(name, value.where(compared, 0), expected.where(compared, 0), limits, problem)


class Coverage:
    """How many basic blocks of the extension have been reached, if the instrumented extension is loaded."""

    def __init__(self) -> None:
        module = _extension._module
        library = None if module is None else ctypes.CDLL(module.__file__)
        self._count: Callable[[], int] | None = getattr(library, "bnfused_blocks_reached", None)

    @property
    def available(self) -> bool:
        return self._count is not None

    def blocks(self) -> int:
        return 0 if self._count is None else self._count()


def mutate(data: bytes, source: random.Random) -> bytes:
    """``data`` with a few bytes changed, added or removed."""
    result = bytearray(data)
    for _ in range(source.randint(1, 4)):
        at = source.randrange(len(result) + 1)
        kind = source.choice(("change", "add", "take out"))
        if kind == "add":
            result.insert(at, source.randrange(256))
        elif at < len(result) and kind == "change":
            result[at] = source.randrange(256)
        elif at < len(result):
            del result[at]
    return bytes(result)


def failure(data: bytes) -> str | None:
    """The failure of a call, without its numbers; None if it has none."""
    try:
        run(data)
    except AssertionError as error:
        return str(error).partition(":")[0]
    return None


def shrink(data: bytes) -> bytes:
    """A call that fails in the same way, with each byte set to 0, the default, if it does not matter for that."""
    kind = failure(data)
    for at in range(len(data)):
        smaller = data[:at] + b"\0" + data[at + 1 :]
        if failure(smaller) == kind:
            data = smaller
    return data.rstrip(b"\0")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="fuzz.py", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=None, help="repeats a run; default: a fresh one")
    parser.add_argument("--call", type=bytes.fromhex, default=None, help="run one call, as printed by a failure")
    options = parser.parse_args(arguments)
    if options.call is not None:
        run(options.call)
        return 0
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    source = random.Random(seed)
    coverage = Coverage()
    print(f"seed {seed}; {'guided' if coverage.available else 'not guided: this build does not count basic blocks'}")
    corpus: list[bytes] = []
    calls, reached, end = 0, 0, time.monotonic() + options.seconds
    while time.monotonic() < end:
        fresh = not corpus or source.random() < 0.3
        data = source.randbytes(BYTES) if fresh else mutate(source.choice(corpus), source)
        try:
            run(data)
        except AssertionError as error:
            print(f"{error}\nagain with: --call {shrink(data).hex()}")
            return 1
        calls += 1
        if coverage.blocks() > reached:
            reached = coverage.blocks()
            corpus.append(data)
    print(f"{calls} calls" + (f", {len(corpus)} kept for the {reached} blocks that they reach" if reached else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
