"""Arguments that more than one of the benchmarks takes."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import folder_of_device

RESULTS = Path(__file__).resolve().parent / "results"


def parse_threads(text: str) -> list[int]:
    """``1,all`` -> [1, number of cores], without repeats."""
    cores = os.cpu_count() or 1
    try:
        counts = [cores if part.strip() == "all" else int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers or 'all', got {text!r}") from None
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"expected at least one thread, got {text!r}")
    return list(dict.fromkeys(counts))


def some_of(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """A parser of names with commas between them."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(part.strip() for part in text.split(","))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}; got {name!r}")
        return names

    return parse


def check_least(parser: argparse.ArgumentParser, options: argparse.Namespace, **least: int) -> None:
    """Refuse an option that is below its least value."""
    for name, value in least.items():
        if getattr(options, name) < value:
            parser.error(f"--{name.replace('_', '-')}: expected at least {value}, got {getattr(options, name)}")


def add_output_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number here, after every measurement")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="write a plot here")
    parser.add_argument(
        "--keep",
        nargs="?",
        type=Path,
        const=RESULTS,
        metavar="FOLDER",
        help=f"write both to FOLDER/<device>/{name}.json and .png (without FOLDER: benchmarks/results)",
    )
    parser.add_argument("--commit", help="what the files say of the code where this is no git checkout")


def check_output_arguments(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.picture is None:
        return
    if options.picture.suffix.lower() not in (".png", ".svg", ".pdf"):
        parser.error(f"--picture: expected a name that ends in .png, .svg or .pdf, got {options.picture}")
    if importlib.util.find_spec("matplotlib") is None:
        # Better known now than after measuring.
        parser.error("--picture needs matplotlib: pip install matplotlib")


def set_output_files(options: argparse.Namespace, environment: Mapping[str, object], name: str) -> None:
    """--keep, for what --json and --picture do not say."""
    if options.keep:
        folder = folder_of_device(options.keep, environment)
        options.json = options.json or folder / f"{name}.json"
        if importlib.util.find_spec("matplotlib") is not None:
            options.picture = options.picture or folder / f"{name}.png"


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What was measured and how, as JSON has it: all arguments but where the numbers go, which is this machine's."""
    return {
        name: str(value) if isinstance(value, (Path, torch.device)) else value
        for name, value in vars(options).items()
        if name not in ("json", "picture", "keep", "commit")
    }
