"""Empty stand-ins for the NVIDIA libraries that a CUDA build of torch loads, so that it imports without 3 GB of them.

Each has the name, the symbols and the symbol versions that torch's libraries need. A call of any of them is an illegal
instruction. They only serve imports on a machine without a GPU: they are never installed and never shipped.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

NVIDIA = re.compile(r"lib(cu|nv|nccl)")
# How their unversioned symbols begin. The symbols of the runtime and of cupti come from the toolkit.
SYMBOLS = re.compile(r"(cu(?!da[A-Z]|pti[A-Z])|nccl|nvshmem|nvrtc|nvJit)")
DRIVER = "libcuda.so.1"  # not stubbed: the runtime must find that there is no driver


@dataclass
class Library:
    """What an ELF library needs: other libraries, and symbols by (file, version). Unversioned ones have "" for both."""

    needed: list[str]
    undefined: dict[tuple[str, str], set[str]]
    defined: set[str] = field(default_factory=set)


def parse(dynamic: str, versions: str, symbols: str) -> Library:
    """A library from what ``readelf`` prints with -d, -V and --dyn-syms, each with -W."""
    file_of: dict[str, str] = {}
    file = ""
    for line in versions.splitlines():
        if match := re.search(r"File: (\S+)", line):
            file = match[1]
        elif match := re.search(r"Name: (\S+)\s+Flags", line):
            file_of[match[1]] = file
    library = Library(re.findall(r"\(NEEDED\).*\[(\S+)\]", dynamic), defaultdict(set))
    for line in symbols.splitlines():
        columns = line.split()
        if len(columns) < 8 or columns[4] not in ("GLOBAL", "WEAK"):
            continue
        name, _, version = columns[7].partition("@")
        if columns[6] != "UND":
            library.defined.add(name)
        elif columns[4] == "GLOBAL":
            library.undefined[file_of.get(version, ""), version].add(name)
    return library


def read(path: Path) -> Library:
    def readelf(*options: str) -> str:
        return subprocess.run(["readelf", "-W", *options, path], capture_output=True, text=True, check=True).stdout

    return parse(readelf("-d"), readelf("-V"), readelf("--dyn-syms"))


def wanted(libraries: Iterable[Library], present: set[str]) -> dict[str, dict[str, set[str]]]:
    """The missing libraries with the symbols that they need, by version. The libraries ``present`` exist already.

    Any loaded library may define unversioned symbols, so the first one gets all of them.
    """
    libraries = list(libraries)
    names = {name for library in libraries for name in library.needed if NVIDIA.match(name)}
    stubs: dict[str, dict[str, set[str]]] = {name: {} for name in sorted(names - present - {DRIVER})}
    defined = {name for library in libraries for name in library.defined}
    for library in libraries:
        for (file, version), symbols in library.undefined.items():
            if file in stubs:
                stubs[file].setdefault(version, set()).update(symbols)
            elif not version and stubs:
                loose = {name for name in symbols - defined if SYMBOLS.match(name)}
                next(iter(stubs.values())).setdefault("", set()).update(loose)
    return stubs


def assembly(symbols: Iterable[str]) -> str:
    """The assembly of a library in which all symbols are at one illegal instruction."""
    lines = [f".globl {name}\n.type {name},@function\n{name}:" for name in sorted(symbols)]
    return "\n".join([".text", *lines, "ud2", '.section .note.GNU-stack,"",@progbits', ""])


def version_script(versions: dict[str, set[str]]) -> str:
    return "".join(
        f"{version} {{ global: {' '.join(f'{name};' for name in sorted(symbols))} }};\n"
        for version, symbols in versions.items()
        if version
    )


def write(torch_libraries: Path, toolkit_libraries: Path, folder: Path) -> list[str]:
    """Makes the libraries that ``torch_libraries`` need and the toolkit does not have; returns their names."""
    paths = sorted(path for path in torch_libraries.iterdir() if ".so" in path.name)
    present = {path.name for path in (*paths, *toolkit_libraries.iterdir())}
    folder.mkdir(parents=True, exist_ok=True)
    stubs = wanted(map(read, paths), present)
    for name, versions in stubs.items():
        source, script = folder / "stub.s", folder / "stub.map"
        source.write_text(assembly({symbol for symbols in versions.values() for symbol in symbols}))
        script.write_text(version_script(versions))
        command = ["gcc", "-shared", "-nostdlib", f"-Wl,-soname,{name}", str(source), "-o", str(folder / name)]
        if script.stat().st_size:
            command.append(f"-Wl,--version-script={script}")
        subprocess.run(command, check=True)
        source.unlink()
        script.unlink()
    return list(stubs)
