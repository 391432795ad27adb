"""Compares what README.md and docs/ claim with the code. Each row of the tables of docs/support.md has a check here."""

from __future__ import annotations

import ast
import collections
import copy
import io
import itertools
import pickle
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[2]))

import bnfused
from benchmarks import results, traffic
from benchmarks.timing import geometric_mean
from bnfused import functional
from support import cases, checks

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("extension")


def table(page: str, heading: str) -> list[list[str]]:
    """The rows of the table of ``page`` whose first heading is ``heading``, each a list of its cells."""
    lines = (ROOT / page).read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :])
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


# --------------------------------------------------------------------- devices, dtypes and layouts

LAYOUTS = {
    "contiguous, channels_last, any dense permutation": (
        "contiguous",
        "channels_last",
        "channels_outermost",
        "batch_innermost",
        "last_two_swapped",
    ),
    "other strides (slices, broadcasts)": ("holes_in_last", "holes_in_batch", "channel_window", "expanded_batch"),
}
REFUSED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "integer": torch.Tensor.long,
    "complex": torch.Tensor.cfloat,
    "sparse": torch.Tensor.to_sparse,
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
}


@pytest.fixture
def formula_calls(monkeypatch):
    """How often the reference computed y, from here on."""
    calls = []
    transform = bnfused.reference.transform

    def counted(*args):
        calls.append(1)
        return transform(*args)

    monkeypatch.setattr(bnfused.reference, "transform", counted)
    return calls


def test_table_of_devices_on_the_cpu(formula_calls):
    """Each CPU row: which dtypes, which layouts, and whether it is the kernel or the formula that computes."""
    rows = [row for row in table("docs/support.md", "device") if row[0] == "CPU"]
    assert len(rows) == 3
    dtypes = []
    for _, names, layouts, forward, backward, double in rows:
        if forward.startswith("no"):
            assert set(re.split(r", ", names)) == set(REFUSED)
            for kind, make in REFUSED.items():
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of torch, when it makes a sparse or a quantized tensor
                    with pytest.raises((RuntimeError, TypeError), match=r"input|\bx\b"):
                        functional.batch_norm(make(torch.randn(3, 4)), None, None, training=True)
                    assert (backward, double) == ("no", "no"), kind
            continue
        dtypes = dtypes if names == "the same" else [getattr(torch, name) for name in names.split(", ")]
        assert len(dtypes) == 4
        for dtype, layout, training in itertools.product(dtypes, LAYOUTS[layouts], (True, False)):
            p = cases.make((4, 3, 2, 5), dtype=dtype, layout=layout, training=training, activation="silu")
            assert forward.startswith("kernel") and backward.startswith("kernel")
            checks.run(functional.batch_norm, p)
            assert not formula_calls, (dtype, layout)
            assert double == "from the reference's formula"
            x = p.x.detach().requires_grad_()
            (grad,) = torch.autograd.grad(checks.call(functional.batch_norm, p, x=x), x, p.grad_y, create_graph=True)
            assert not formula_calls
            torch.autograd.grad(grad.sum(), x)
            assert formula_calls
            formula_calls.clear()
            copied = bool(checks.call(functional.batch_norm, p).stride() != p.x.stride())
            assert copied == ("after a copy" in forward), (layout, forward)


# -------------------------------------------------------------------------------------- companions


def drop_in():
    bn = bnfused.BatchNorm2d(4)
    bn(torch.randn(3, 4, 5, 2))
    assert isinstance(bn, nn.BatchNorm2d)
    nn.BatchNorm2d(4).load_state_dict(bn.state_dict(), strict=True)
    assert torch.equal(pickle.loads(pickle.dumps(bn)).running_var, bn.running_var)
    assert torch.equal(copy.deepcopy(bn).running_var, bn.running_var)


def transforms():
    p = cases.make((4, 3, 2), dtype=torch.float64, running=False, counter=None)

    def loss(x):
        return (checks.call(functional.batch_norm, p, x=x) * p.grad_y).sum()

    grad = torch.func.grad(loss)(p.x)
    _, tangent = torch.func.jvp(loss, (p.x,), (p.grad_y,))
    torch.testing.assert_close(tangent, (grad * p.grad_y).sum())
    per_sample = torch.func.vmap(torch.func.grad(loss))(torch.stack([p.x, 2 * p.x]))
    torch.testing.assert_close(per_sample[0], grad)


def compilers():
    bn = bnfused.BatchNorm2d(3).eval()
    x = torch.randn(2, 3, 4, 4)
    program = torch.export.export(bn, (x,))
    assert [str(n.target) for n in program.graph.nodes if n.op == "call_function"] == [
        "bnfused.batch_norm_eval.default"
    ]
    torch._dynamo.reset()
    assert checks.same_bits(torch.compile(bn, backend="aot_eager", fullgraph=True)(x).detach(), bn(x).detach())


def double_backward_of_a_compiled_graph():
    torch._dynamo.reset()
    x = torch.randn(4, 3, requires_grad=True)
    y = torch.compile(bnfused.BatchNorm1d(3), backend="aot_eager")(x)
    (grad,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
    grad.sum().backward()


def tracers():
    bn = bnfused.BatchNorm2d(3).eval()
    x = torch.randn(2, 3, 4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert checks.same_bits(torch.jit.trace(bn, x)(x).detach(), bn(x).detach())
        assert torch.jit.script(bn).original_name == "BatchNorm2d"
    traced = torch.fx.symbolic_trace(nn.Sequential(bn))
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]


def sync_batch_norm():
    bn = nn.SyncBatchNorm.convert_sync_batchnorm(bnfused.BatchNorm2d(3))
    bn(torch.randn(2, 3, 4, 4), activation="relu")


def onnx():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(bnfused.BatchNorm2d(3).eval(), (torch.randn(2, 3, 4, 4),), io.BytesIO(), dynamo=False)


def dtensor():
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        x = DTensor.from_local(torch.randn(2, 3, 4, 4), mesh, [Replicate()])
        functional.batch_norm(x, None, None, training=True)
    finally:
        torch.distributed.destroy_process_group()


def nested_tensors():
    functional.batch_norm(torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(2, 4)]), None, None, training=True)


# By the first words of a row: what must work, or raise where the row says no.
TOGETHER = {
    "`state_dict`, pickle": drop_in,
    "`torch.func` transforms": transforms,
    "`torch.compile`, `torch.export`": compilers,
    "double backward of a compiled graph": double_backward_of_a_compiled_graph,
    "`torch.jit`, `torch.fx`": tracers,
    "`SyncBatchNorm.convert_sync_batchnorm`": sync_batch_norm,
    "ONNX": onnx,
    "DTensor": dtensor,
    "nested tensors": nested_tensors,
}


def test_every_row_of_together_with_is_checked():
    """A row without a check, or a check without a row, is a claim that nobody holds."""
    labels = [row[0] for row in table("docs/support.md", "together with")]
    unchecked = [label for label in labels if not any(label.startswith(known) for known in TOGETHER)]
    missing = [known for known in TOGETHER if not any(label.startswith(known) for label in labels)]
    assert (unchecked, missing) == ([], [])


@pytest.mark.parametrize("label", TOGETHER)
def test_together_with(label):
    """The row's answer: it works, or it is no and an exception says so."""
    (answer,) = [row[1] for row in table("docs/support.md", "together with") if row[0].startswith(label)]
    if not answer.startswith("no"):
        TOGETHER[label]()
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((RuntimeError, TypeError, NotImplementedError)) as raised:
            TOGETHER[label]()
    assert len(str(raised.value)) > 20, "an error says what is the matter"


# ----------------------------------------------------------------------------------- measured numbers

MEASURED = ROOT / "benchmarks" / "results" / "cpu-amd-epyc-zen5" / "bench.json"
# The key is the first cell of a row of the table in docs/performance.md. COLUMNS has its columns.
FAMILIES = {
    "NCHW, NCL, NCDHW float32": "channels first float32",
    "channels_last, (N, C) float32": "channels last float32",
    "NCHW, NCL, NCDHW bfloat16": "channels first 16-bit",
    "channels_last, (N, C) bfloat16": "channels last 16-bit",
    "channels_last, 2 to 12 channels, float32": "few channels, channels last",
    "`grad_y` in another layout than `x`, NLC view": "x and grad_y in different layouts, NLC view",
    "expanded `grad_y` (`y.sum().backward()`)": "expanded grad_y",
    "outputs of 32 MiB and more": "outputs >= 32 MiB",
    "(64, 256)": "tiny (64,256)",
}
COLUMNS = [
    *itertools.product(("forward", "forward+backward"), ("plain", "relu", "add_relu")),
    *(("eval", "plain"), ("eval", "relu")),
]


@pytest.fixture(scope="module")
def measured():
    """The ratios to torch that were measured, by family, pass, fusion and threads."""
    ratios = collections.defaultdict(list)
    for cell in results.read_cells(MEASURED).results:
        ratios[cell.family, cell.pass_name, cell.fusion, cell.threads].append(cell.ratio("torch"))
    return ratios


def test_the_table_of_speeds_is_what_was_measured(measured):
    """Each number is the geometric mean of its cells, on one thread and on two; a run that is kept changes both."""
    rows = table("docs/performance.md", "tensors")
    assert [row[0] for row in rows] == list(FAMILIES)
    for label, *cells in rows:
        for (pass_name, fusion), cell in zip(COLUMNS, cells, strict=True):
            found = [measured.get((FAMILIES[label], pass_name, fusion, threads), []) for threads in (1, 2)]
            assert bool(cell) == all(found), (label, pass_name, fusion)
            for printed, ratios in zip(cell.split(" / ") if cell else (), found, strict=False):
                half_a_digit = 0.5 * 10 ** -len(printed.partition(".")[2])
                wanted = geometric_mean(ratio.median for ratio in ratios)
                assert abs(float(printed) - wanted) <= 1.001 * half_a_digit, (label, pass_name, fusion, wanted)


def test_how_many_cells_are_slower_is_what_was_measured(measured):
    """Slower by more than the spread: the upper quartile of the ratio is below 1 too."""
    ratios = [ratio for of_key in measured.values() for ratio in of_key]
    slower = sum(ratio.high < 1 for ratio in ratios)
    page = " ".join((ROOT / "docs/performance.md").read_text().split())
    assert re.search(rf"\({slower} of {len(ratios)} cells (is|are) slower", page)


# The key is the first cell of a row of the README's table, which has some cells of the large one.
IN_THE_README = {
    "ReLU, training, forward": ("forward", "relu"),
    "add and ReLU, training, forward and backward": ("forward+backward", "add_relu"),
    "nothing, eval": ("eval", "plain"),
}


def test_the_speeds_in_the_readme_are_those_of_the_large_table():
    """Its three rows repeat the first row of docs/performance.md; a new run must change both pages."""
    (float32,) = [
        cells for label, *cells in table("docs/performance.md", "tensors") if label.startswith("NCHW, NCL, NCDHW f")
    ]
    rows = table("README.md", "batch norm with")
    assert [row[0] for row in rows] == list(IN_THE_README)
    for label, *numbers in rows:
        assert " / ".join(numbers) == float32[COLUMNS.index(IN_THE_README[label])], label


@pytest.mark.parametrize("page", ["docs/performance.md", "benchmarks/results/model/gpu_traffic.md"])
def test_the_tables_of_the_gpu_model_are_what_it_says(page, capsys):
    """A change of ``csrc/plan.h`` changes both; rows of batch 128 on an H100, which both pages have."""
    traffic.print_networks([128], ["h100"])
    said = [line for line in capsys.readouterr().out.splitlines() if "| 128 | H100 |" in line]
    assert len(said) == 2 * len(traffic.NETWORKS)
    rows = (ROOT / page).read_text().splitlines()
    for row in said:
        assert row in rows or row.replace("| 128 | H100 |", "|") in rows, row


# -------------------------------------------------------------------------------------------- docs


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PATH = re.compile(r"(?:bnfused|csrc|tests|benchmarks|examples|docs|\.ci)/[\w.*/-]*")


def paths_of(page: str) -> list[str]:
    """The paths of files and folders that a page names, in backticks or in a block that is not Python or C++."""
    blocks = "\n".join(re.findall(r"^```(?:bash)?\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))
    quoted = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL))
    return [word for text in (*quoted, blocks) for word in re.split(r"[\s,;:()]+", text) if PATH.fullmatch(word)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_named_in_the_docs_exist(page):
    """A file that was moved must not leave its old path in a page; ``*`` stands for some names."""
    missing = [path for path in paths_of(page.read_text()) if not any(ROOT.glob(path.rstrip("/")))]
    assert not missing


def test_symbols_named_next_to_a_file_are_in_it():
    """A page that says `file`, `name` claims that the file has the name: the walk, and the lists to add."""
    named = []
    for page in PAGES:
        named += re.findall(r"`([\w./]+\.\w+)`[,:]\s`(?:enum class |struct |class )?([A-Za-z_]\w*)`", page.read_text())
    assert len(named) > 3
    for path, symbol in named:
        assert PATH.fullmatch(path), f"the path of `{symbol}` has to begin at the root: {path}"
        assert re.search(rf"\b{symbol}\b", (ROOT / path).read_text()), f"{path}: {symbol}"


def test_code_shown_in_the_docs_is_the_code():
    """A block of C++ begins with the path of its file, and its lines follow each other there."""
    shown = [
        block for page in PAGES for block in re.findall(r"^```cpp\n// (.*?)\n(.*?)^```$", page.read_text(), re.M | re.S)
    ]
    assert shown
    for path, code in shown:
        assert code in (ROOT / path).read_text(), f"a page shows other code than {path} has"


def test_paths_are_found():
    """In text, in commands and in the list of layers, but not in the Python of a page."""
    page = "See `csrc/plan.h` and `python tests/a.py::test_b`, `x/y`.\n\n```\nbnfused/ops.py   as docs/no.md, x\n```\n"
    page += "\n```python\nbnfused/no.py\n```\n\n```bash\npython examples/c.py --json\n```\n"
    assert paths_of(page) == ["csrc/plan.h", "tests/a.py", "bnfused/ops.py", "docs/no.md", "examples/c.py"]


def functions_of(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_tests_named_in_the_numerics_exist():
    """Each promise names the test that would fail; a test that was renamed must not leave it hanging."""
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs" / "numerics.md").read_text())
    assert len(named) > 15
    for path, name in named:
        assert name in functions_of(ROOT / path), f"{path}::{name}"


def test_bounds_in_the_numerics_are_those_of_the_tests():
    """The numbers that users read are the constants that the tests compare with."""
    text = (ROOT / "docs" / "numerics.md").read_text()
    rows = {
        row[0]: row[1] for row in re.findall(r"^\| ((?:b?float)\w+(?:, float16)?) \| ([^|]+) \|", text, re.MULTILINE)
    }
    assert [float(number) for number in re.findall(r"\d+e-\d+", rows["float32"])] == [cases.FLOAT32]
    assert [float(n) for n in re.findall(r"\d+e-\d+", rows["float64"])] == [cases.FLOAT64, cases.FLOAT64_HARD]
    assert [float(number) for number in re.findall(r"\d+e-\d+", rows["bfloat16, float16"])] == [cases.FLOAT32]
