"""Many threads, forks, interrupts, odd memory and many calls: what a long-lived process does to a module."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import bnfused
from bnfused import functional
from support import cases, checks

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("extension")


def in_threads(count, work):
    """``work(i)`` in ``count`` threads that start together; what one raises is raised here."""
    gate = threading.Barrier(count)

    def run(i):
        gate.wait(timeout=60)
        return work(i)

    with ThreadPoolExecutor(count) as pool:
        return [job.result(timeout=120) for job in [pool.submit(run, i) for i in range(count)]]


def step(module, x, **fusion):
    """Forward and backward; y and the gradient of x."""
    leaf = x.detach().requires_grad_()
    y = module(leaf, **fusion)
    (grad,) = torch.autograd.grad(y, leaf, torch.linspace(-1, 1, y.numel()).view_as(y))
    return y.detach(), grad


INPUTS = {
    "tiny": (2, 8, 2, 2),
    # Past the 32768 values from which the work of one call is split over threads.
    "split": (8, 16, 24, 24),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("size", INPUTS)
def test_threads_on_modules_of_their_own(size, training, threads):
    """Forward and backward at once, each as if it were alone: values, gradients and state."""
    inputs = [torch.randn(INPUTS[size]) for _ in range(6)]
    channels = INPUTS[size][1]
    calls = 40 if size == "tiny" else 6

    def work(i):
        torch.set_num_threads(threads)  # of this thread: OpenMP keeps one number for each
        module = bnfused.BatchNorm2d(channels).train(training)
        for _ in range(calls):
            results = step(module, inputs[i], activation="silu")
        return *results, module.running_mean, module.running_var, module.num_batches_tracked

    alone = [work(i) for i in range(6)]
    for mine, wanted in zip(in_threads(6, work), alone, strict=True):
        for a, b in zip(mine, wanted, strict=True):
            assert checks.same_bits(a, b)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_threads_on_one_module(training):
    """A module shared by threads: y and gradients are each call's own, and the statistics are those of some call.

    With momentum 1 each update leaves one batch's statistics whole, or with two threads at once a mixture of whole
    channels; a value that no batch has would be a torn one.
    """
    module = bnfused.BatchNorm2d(16, momentum=1.0).train(training)
    inputs = [torch.randn(INPUTS["split"]) * (i + 1) for i in range(4)]
    wanted = [step(bnfused.BatchNorm2d(16).train(training), x) for x in inputs]
    single = []
    for x in inputs:
        own = bnfused.BatchNorm2d(16, momentum=1.0)
        own(x)
        single.append(own.running_var)

    def work(i):
        return [step(module, inputs[i]) for _ in range(10)]

    for results, (y, grad) in zip(in_threads(4, work), wanted, strict=True):
        for result in results:
            assert checks.same_bits(result[0], y)
            assert checks.same_bits(result[1], grad)
    known = torch.stack(single) if training else torch.ones(1, 16)
    assert (module.running_var == known).any(0).all()


def test_backward_in_another_thread_with_another_number_of_threads():
    """The forward on two threads, the backward on one or three: the saved statistics do not depend on who reads."""
    x = torch.randn(INPUTS["split"])
    module = bnfused.BatchNorm2d(16)
    wanted = step(bnfused.BatchNorm2d(16), x)
    upstream = torch.linspace(-1, 1, x.numel()).view_as(x)
    try:
        for forward, backward in ((2, 1), (1, 3), (3, 2)):
            torch.set_num_threads(forward)
            leaf = x.detach().requires_grad_()
            y = module(leaf)

            def pull_back(y=y, leaf=leaf, backward=backward):
                torch.set_num_threads(backward)
                return torch.autograd.grad(y, leaf, upstream)[0]

            with ThreadPoolExecutor(1) as pool:
                grad = pool.submit(pull_back).result(timeout=60)
            for actual, exact in ((y.detach(), wanted[0]), (grad, wanted[1])):
                limits = cases.limit(exact.double(), 1.0, torch.float32)
                checks.assert_within(f"{forward} then {backward}", actual, exact.double(), limits)
    finally:
        torch.set_num_threads(1)


def test_number_of_threads_changes_while_others_compute():
    """torch.set_num_threads in one thread, calls in others."""
    x = torch.randn(INPUTS["split"])
    wanted = step(bnfused.BatchNorm2d(16).eval(), x)[0]
    stop = threading.Event()

    def work(i):
        if i == 0:
            for n in range(200):
                torch.set_num_threads(1 + n % 3)
            stop.set()
            return True
        module, right = bnfused.BatchNorm2d(16).eval(), True
        while not stop.is_set():
            right &= checks.same_bits(step(module, x)[0], wanted)
        return right

    try:
        assert all(in_threads(4, work))
    finally:
        torch.set_num_threads(1)


# ------------------------------------------------------------------------------------ the process


def run_script(script, timeout=120):
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_fork_after_use():
    """A child forked after the parent has computed on threads computes the same, on one thread as DataLoader's do."""
    script = """
import os, sys, torch, warnings, bnfused
warnings.simplefilter("ignore")
torch.set_num_threads(2)
bn, x = bnfused.BatchNorm2d(16), torch.randn(8, 16, 24, 24)
def step():
    leaf = x.clone().requires_grad_()
    y = bn.eval()(leaf, activation="relu")
    y.sum().backward()
    return y.detach(), leaf.grad
wanted = step()
pid = os.fork()
if pid == 0:
    torch.set_num_threads(1)
    same = all(torch.equal(a, b) for a, b in zip(step(), wanted))
    bn.train()(x)
    os._exit(0 if same and int(bn.num_batches_tracked) == 1 else 1)
_, status = os.waitpid(pid, 0)
assert status == 0, status
assert all(torch.equal(a, b) for a, b in zip(step(), wanted))
assert int(bn.num_batches_tracked) == 0
"""
    run_script(script)


def test_interrupt_leaves_the_module_usable():
    """KeyboardInterrupt wherever it may strike: a call has happened or it has not, and the next one is right."""
    module = bnfused.BatchNorm1d(4, momentum=None)
    x = torch.randn(6, 4)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    struck = 0
    try:
        for i in range(150):
            try:
                # Again and again: one that strikes in a destructor is printed there, and does not get here.
                signal.setitimer(signal.ITIMER_REAL, 2e-4 + 3e-6 * i, 0.5)
                while True:
                    leaf = x.detach().requires_grad_()
                    module(leaf, activation="relu").sum().backward()
            except KeyboardInterrupt:
                struck += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert struck == 150
    # The cumulative average of equal batches is that batch, whatever their number: an update that was counted and not
    # made, or made and not counted, would show.
    wanted = x.double().mean(0)
    checks.assert_within("running_mean", module.running_mean, wanted, cases.limit(wanted, 1.0, torch.float32))
    twin = nn.BatchNorm1d(4)
    actual, wanted = module(x), twin(x).detach().double()
    checks.assert_within("y", actual, wanted, cases.limit(wanted, 4.0, torch.float32))


def test_no_memory_is_lost(request):
    """Calls of every kind leave no more memory in use than before: three times 20 thousand, or with --large a million.

    A tensor, a graph node or a tuple lost in each call would be 2 MB at least, each time; what the allocator or the
    system rounds up, to a huge page at most, it rounds up once.
    """
    calls = 1_000_000 if request.config.getoption("--large") else 20_000
    script = f"""
import resource, torch, bnfused
torch.set_num_threads(1)
bn, x = bnfused.BatchNorm2d(4), torch.randn(2, 4, 2, 2)
leaf = x.clone().requires_grad_()
wrong = torch.randn(2, 5, 2, 2)
def kinds(n):
    for _ in range(n // 4):
        with torch.no_grad():
            bn(x, x, "relu")
        bn(leaf, leaf, "relu").sum().backward()
        bn.eval()(leaf).sum().backward()
        bn.train()
        leaf.grad = None
        try:
            bn(wrong)
        except RuntimeError:
            pass
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
kinds(4000)
grown = []
for _ in range(3):
    before = resident()
    kinds({calls})
    grown.append(resident() - before)
print(min(grown))
"""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("no /proc/self/statm here")
    grown = int(run_script(script, timeout=900))
    assert grown < 2**20, f"at least {grown} bytes in each {calls} calls"


# --------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("offset", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_views_of_any_alignment(dtype, offset):
    """Tensors that begin ``offset`` elements into their memory, in both layouts, read and written by the kernels."""
    p = cases.make((3, 17, 5, 7), dtype=dtype, residual=True, activation="relu")
    wanted = checks.run(functional.batch_norm, p).values

    def moved(tensor):
        buffer = tensor.new_empty(tensor.numel() + offset)
        return buffer[offset:].view(tensor.shape).copy_(tensor)

    names = ("x", "residual", "grad_y", "weight", "bias", "running_mean", "running_var")
    values = checks.run(functional.batch_norm, p.but(**{n: moved(getattr(p, n)) for n in names})).values
    for name, value in values.items():
        assert checks.same_bits(value, wanted[name]), name


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("past", [0, 1])
def test_nothing_is_read_or_written_past_the_end(layout, past):
    """Around each argument lie NaNs: one that is read spoils a result, one that is overwritten is gone."""
    for shape in ((2, 3, 5), (3, 17, 7, 7), (5, 33, 1, 3), (1, 8, 64, 65)):
        p = cases.make(shape, layout=layout, residual=True, activation="relu")
        buffers = {}

        def fenced(name, p=p, buffers=buffers):
            tensor = getattr(p, name)
            buffers[name] = tensor.new_full((tensor.numel() + 64 + past,), float("nan"))
            return buffers[name].as_strided(tensor.shape, tensor.stride(), 32 + past).copy_(tensor)

        names = ("x", "residual", "grad_y", "weight", "bias", "running_mean", "running_var")
        fencing = {name: fenced(name) for name in names}
        checks.check_against_oracle(functional.batch_norm, p.but(**fencing))
        checks.call(functional.batch_norm, p.but(**fencing))
        for name, buffer in buffers.items():
            ends = torch.cat([buffer[: 32 + past], buffer[32 + past + getattr(p, name).numel() :]])
            assert ends.isnan().all(), name
