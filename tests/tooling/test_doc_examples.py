"""What the documents show: their Python runs, and what they link to is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*RUN, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SCRIPT = re.compile(r"^```python torchrun\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")


def name(document: Path) -> str:
    return str(document.relative_to(ROOT))


def python_blocks(text: str, path: str) -> list[object]:
    """Each block compiled, with the line numbers of the document."""
    return [
        compile("\n" * text.count("\n", 0, block.start(1)) + block[1], path, "exec") for block in BLOCK.finditer(text)
    ]


@pytest.mark.parametrize("document", RUN, ids=name)
def test_python_runs(document, extension):
    """Every block, in the order of the page: later ones may use what earlier ones defined."""
    names: dict[str, object] = {"__name__": "__main__"}
    for block in python_blocks(document.read_text(), str(document)):
        exec(block, names)


def scripts() -> list[object]:
    return [
        pytest.param(script, id=f"{name(document)}-{i}")
        for document in RUN
        for i, script in enumerate(SCRIPT.findall(document.read_text()))
    ]


@pytest.mark.parametrize("script", scripts())
def test_scripts_run_on_two_processes(script, extension, tmp_path):
    """Those that are shown for torchrun."""
    # Threads of Gloo and DDP must not meet an interpreter that shuts down: DISTRIBUTED in test_training_stack.py.
    (tmp_path / "train.py").write_text(f"{script}\nimport os, sys\nsys.stdout.flush()\nos._exit(0)\n")
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    accuracy = re.search(r"accuracy (\d+)%", result.stdout)
    assert ("accuracy" not in script) or int(accuracy[1]) > 80  # an untrained one has 10


@pytest.mark.parametrize("document", LINKED, ids=name)
def test_links_lead_somewhere(document):
    """Files, and headings within them as GitHub names them."""
    text = document.read_text()
    for path, heading in LINK.findall(text):
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), f"{name(document)} links to {path}"
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in headings]
            assert heading in anchors, f"{name(document)} links to {path}#{heading}"


def test_blocks_are_found_with_their_lines():
    """A page whose second block fails says where; other languages are not run."""
    page = "# Title\n\n```python\na = 1\n```\n\n```bash\nexit 1\n```\n\n```python\n\nassert a == 2\n```\n"
    first, second = python_blocks(page, "page.md")
    names: dict[str, object] = {}
    exec(first, names)
    with pytest.raises(AssertionError) as failure:
        exec(second, names)
    assert failure.traceback[-1].lineno + 1 == 13  # pytest counts from 0


def test_every_document_is_looked_at():
    """A renamed folder would leave the tests above with nothing to do."""
    pages = {"README.md", "docs/architecture.md", "docs/performance.md", "docs/support.md", "docs/why.md"}
    assert pages <= set(map(name, RUN))
    assert sum(len(BLOCK.findall(document.read_text())) for document in RUN) >= 4
