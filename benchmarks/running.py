"""How a benchmark goes through its measurements: progress, failures, the time limit, Ctrl-C, and its files."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from rich.console import Console

from benchmarks.report import progress_bar
from benchmarks.results import Result, Run


class Piece(Protocol):
    """One measurement."""

    @property
    def title(self) -> str: ...


SomePiece = TypeVar("SomePiece", bound=Piece)


def measure_each(
    pieces: Sequence[SomePiece],
    run: Run[Result],
    options: argparse.Namespace,
    console: Console,
    measure: Callable[[SomePiece, Callable[[int], None]], tuple[list[Result], bool]],
    keep: Callable[[SomePiece, list[Result], Console], None],
) -> None:
    """Measure piece by piece and write the file of ``run`` after each. Ctrl-C and the limit keep what there is.

    ``measure`` is also given what to call after each round. It returns the results and whether it was interrupted;
    then ``keep`` adds the results to ``run`` and prints them.
    """
    begin = time.perf_counter()
    limit = math.inf if options.limit is None else options.limit
    left = list(pieces)
    try:
        with progress_bar(console) as progress:
            task = progress.add_task("", total=len(pieces) * options.rounds)
            while left and not run.interrupted and time.perf_counter() - begin < limit:
                piece = left[0]

                def on_round(done: int, before: int = len(pieces) - len(left), title: str = piece.title) -> None:
                    # Rounds may end early for lack of time, so the bar can only jump forward from here.
                    completed = before * options.rounds + done
                    progress.update(task, completed=completed, description=f"{title}, round {done}")
                    progress.refresh()

                on_round(0)
                results: list[Result] = []
                try:
                    results, run.interrupted = measure(piece, on_round)
                except Exception as error:  # a failure is a result too, and the remaining ones are worth having
                    message = str(error).splitlines()[0][:300] if str(error) else ""
                    run.failed.append(f"{piece.title}: {type(error).__name__}: {message}")
                    progress.console.print(f"FAILED {run.failed[-1]}", style="bold red", markup=False)
                del left[0]
                keep(piece, results, progress.console)
                if options.json:
                    run.write(options.json)
    except KeyboardInterrupt:
        run.interrupted = True
    finally:
        run.not_measured = [piece.title for piece in left]


def finish(
    run: Run[Result], options: argparse.Namespace, console: Console, what: str, draw: Callable[[], None] | None
) -> None:
    """Say what is missing and why, and write the files. ``what`` names the pieces; ``draw`` makes the picture."""
    if run.interrupted:
        console.print("[bold]Interrupted:[/] the numbers are from what was measured until then.")
    if run.not_measured:
        console.print(f"{len(run.not_measured)} {what} were left out, {run.not_measured[0]} first.", markup=False)
    if options.json:
        run.write(options.json)
        console.print(f"numbers: {options.json}", markup=False)
    if options.picture and draw is not None:
        draw()
        console.print(f"picture: {options.picture}", markup=False)
    for message in run.failed:
        console.print(f"FAILED {message}", style="bold red", markup=False)
