"""The ``backend`` fixture, fresh but reproducible random data, and a report of what ran where."""

from __future__ import annotations

import importlib
import random
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import bnfused
from bnfused import _extension
from emulator import emulated
from support.on_device import on_device

# emulated: the CUDA backend on the emulated device, tests/emulator. cuda: on a GPU, where there is one; the tests'
# tensors are moved there and back.
BACKENDS = ("reference", "cpu", "emulated", *(["cuda"] if torch.cuda.is_available() else []))


@dataclass(frozen=True)
class Backend:
    """One way to run batch norm; ``batch_norm`` has the signature of ``bnfused.functional.batch_norm``."""

    name: str
    batch_norm: Callable[..., Tensor]

    def __repr__(self) -> str:
        return self.name


def _backend(name: str, monkeypatch: pytest.MonkeyPatch, strategy: str | None) -> Backend:
    if name == "reference":
        return Backend(name, bnfused.reference.batch_norm)
    require_extension()
    if name == "emulated":
        for op in _extension.OPS:
            monkeypatch.setattr(bnfused.ops, op, getattr(emulated.ops(), op))
        emulated.force(strategy)
    if name == "cuda":
        if not _extension.has_cuda():
            pytest.fail("a GPU is here, and the extension was built without CUDA kernels", pytrace=False)
        return Backend(name, on_device(bnfused.functional.batch_norm, "cuda"))
    return Backend(name, bnfused.functional.batch_norm)


def require_extension() -> None:
    """A kernel that was not built has not passed: fail, do not skip."""
    if not bnfused.is_available():
        pytest.fail(f"{bnfused.why_unavailable()}", pytrace=False)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """Each implementation in turn."""
    request.node.user_properties.append(("backend", request.param))
    return _backend(request.param, monkeypatch, request.config.getoption("--strategy"))


@pytest.fixture
def extension(request: pytest.FixtureRequest) -> None:
    """For tests of the compiled ops themselves."""
    request.node.user_properties.append(("backend", "cpu"))
    require_extension()


@pytest.fixture(scope="session")
def torchvision() -> ModuleType:
    """torchvision, where its compiled operators do not load as well: its networks need none of them.

    Its wheels are for one build of torch each, and beside another (a CPU one, a newer one) it cannot be imported for
    want of two operators of object detection.
    """
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        pytest.fail(f"{error}; install it with: pip install --no-deps -r requirements-networks.txt", pytrace=False)
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
    for name in ("nms", "qnms"):
        _STAND_INS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("torchvision")


_STAND_INS = torch.library.Library("torchvision", "FRAGMENT")  # what it defines goes with it


@pytest.fixture(scope="session")
def timm(torchvision: ModuleType) -> ModuleType:
    """timm, which imports torchvision."""
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        pytest.fail(f"{error}; install it with: pip install --no-deps -r requirements-networks.txt", pytrace=False)


@pytest.fixture(params=(1, 2), ids=("1thread", "2threads"))
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """The test with one thread and with two.

    Every other test runs on one: nearly all tensors here are too small to be split, and on a busy machine two threads
    wait for each other longer than they compute.
    """
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seed",
        type=int,
        default=None,
        help="seed of the random data; a fresh one in every run, printed in the header and by every failure",
    )
    parser.addoption("--sanitize", action="store_true", help="also run the CUDA kernels under AddressSanitizer")
    parser.addoption("--backend", choices=BACKENDS, help="only the tests that take a backend, on this one")
    parser.addoption(
        "--strategy",
        choices=sorted(emulated.STRATEGIES),
        help="of the emulated backend, where the problem allows it; the planner's choice without",
    )
    parser.addoption("--large", action="store_true", help="also run the tests that need more than 2^31 elements")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--backend")
    if wanted is None:
        return
    kept = [item for item in items if getattr(item, "callspec", None) and item.callspec.params.get("backend") == wanted]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seeds torch and ``random`` for this test, from the seed of the run and the test's name; pytest shows the line of
    a failure."""
    base = request.config.stash[_SEED]
    own = zlib.crc32(f"{base} {request.node.nodeid}".encode())
    torch.manual_seed(own)
    random.seed(own)
    print(f"random data: rerun with --seed {base}")
    return own


_SEED = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    given = config.getoption("--seed")
    drawn = random.SystemRandom().randrange(10**6) if given is None else given
    # A process of pytest-xdist has the seed of the one that prints it.
    config.stash[_SEED] = getattr(config, "workerinput", {}).get("seed", drawn)
    torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_configure_node(node: Any) -> None:
    node.workerinput["seed"] = node.config.stash[_SEED]


def pytest_report_header(config: pytest.Config) -> list[str]:
    extension = "built" if bnfused.is_available() else f"MISSING: {bnfused.why_unavailable()}"
    return [
        f"bnfused {bnfused.__version__}: torch {torch.__version__}, 1 thread and in some tests 2, "
        f"CPU capability {torch.backends.cpu.get_cpu_capability()}; backends {', '.join(BACKENDS)}; "
        f"extension {extension}",
        f"random data: --seed {config.stash[_SEED]}",
    ]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts: dict[str, Counter[str]] = {name: Counter() for name in BACKENDS}
    for outcome, reports in terminalreporter.stats.items():
        for report in reports:
            names = dict(getattr(report, "user_properties", ()))
            if "backend" in names and report.when != "teardown":
                counts[names["backend"]][outcome] += 1
    terminalreporter.section("backends")
    for name, outcomes in counts.items():
        results = ", ".join(f"{n} {outcome}" for outcome, n in outcomes.items() if outcome)
        terminalreporter.line(f"{name}: {results or 'NOT RUN'}")
    if not bnfused.is_available():
        terminalreporter.line(f"rebuild: {_extension.REBUILD}")
