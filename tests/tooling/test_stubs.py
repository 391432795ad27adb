"""Which stand-ins tests/cuda_build makes for NVIDIA's libraries, from what readelf says of torch's."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "cuda_build"))

import stubs

DYNAMIC = """
 0x0000000000000001 (NEEDED)             Shared library: [libcublas.so.13]
 0x0000000000000001 (NEEDED)             Shared library: [libcudart.so.13]
 0x0000000000000001 (NEEDED)             Shared library: [libcuda.so.1]
 0x0000000000000001 (NEEDED)             Shared library: [libc.so.6]
 0x000000000000000e (SONAME)             Library soname: [libtorch_cuda.so]
"""
VERSIONS = """
  000000: Version: 1  File: libcublas.so.13  Cnt: 1
  0x0010:   Name: libcublas.so.13  Flags: none  Version: 7
  0x0020: Version: 1  File: libcudart.so.13  Cnt: 1
  0x0030:   Name: libcudart.so.13  Flags: none  Version: 6
"""
SYMBOLS = """
   Num:    Value          Size Type    Bind   Vis      Ndx Name
     1: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND cublasCreate_v2@libcublas.so.13 (7)
     2: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND cudaMalloc@libcudart.so.13 (6)
     3: 0000000000000000     0 NOTYPE  WEAK   DEFAULT  UND cublasOptional@libcublas.so.13 (7)
     4: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND ncclAllReduce
     5: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND cudaUnversioned
     6: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND cudnn_of_torch
     7: 0000000000001000     8 FUNC    GLOBAL DEFAULT   12 cudnn_of_torch
     8: 0000000000001000     8 FUNC    LOCAL  DEFAULT   12 culocal
"""


def test_what_is_asked_for_and_not_there() -> None:
    """The toolkit's runtime and the driver stay real; what another of torch's libraries defines is no stub's."""
    library = stubs.parse(DYNAMIC, VERSIONS, SYMBOLS)
    assert stubs.wanted([library], {"libcudart.so.13"}) == {
        "libcublas.so.13": {"libcublas.so.13": {"cublasCreate_v2"}, "": {"ncclAllReduce"}}
    }


def test_assembly_and_versions() -> None:
    text = stubs.assembly({"a", "b"})
    assert text.index("a:") < text.index("b:") < text.index("ud2")
    assert stubs.version_script({"v1": {"a", "b"}, "": {"c"}}) == "v1 { global: a; b; };\n"
