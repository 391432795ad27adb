"""Why batch norm works, on handwritten digits: train with and without it, measure, and draw ``docs/why.md``'s figures.

Three networks are trained by plain SGD, in one process per core. Speed: every variant over a grid of learning rates
until it is accurate. Traces: some variants at one rate each, with the measures of ``bnfused.diagnostics`` taken along
the way. Figures and tables are written to ``docs/``; the text around the tables is kept.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.arguments import check_least
from benchmarks.environment import backend_line, missing_packages
from benchmarks.report import make_console
from examples.why_pictures import fill_in, save_figures, tables
from examples.why_trainings import FULL, QUICK, measure

ROOT = Path(__file__).resolve().parents[1]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="why_batch_norm.py",
        description="Train small networks on handwritten digits with and without batch norm, measure what batch norm "
        "changes, and write the figures and tables of docs/why.md.",
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="holds why.md, whose tables are replaced, and figures/ (default: docs; with --quick: build/why)",
    )
    options = parser.parse_args(arguments)
    check_least(parser, options, workers=1)
    if options.output is None:
        options.output = ROOT / "build" / "why" if options.quick else ROOT / "docs"
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = make_console()
    if missing_packages(console, sklearn="scikit-learn", matplotlib="matplotlib"):
        return 2
    console.print(backend_line(), markup=False, soft_wrap=True)
    effort = QUICK if options.quick else FULL
    try:
        results = measure(effort, options.workers, console)
    except KeyboardInterrupt:
        console.print("Interrupted: nothing was written.")
        return 130
    filled = tables(results)
    page = options.output / "why.md"
    text = page.read_text() if page.exists() else (ROOT / "docs" / "why.md").read_text()
    paths = save_figures(results, options.output / "figures")
    page.write_text(fill_in(text, filled))
    for path in (page, *paths):
        console.print(f"written: {path}", markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
