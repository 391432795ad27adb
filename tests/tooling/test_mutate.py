"""What ``mutate.py`` plants, and that what it leaves alone is there."""

from __future__ import annotations

from collections import Counter

from tools.equivalent_faults import EQUIVALENT
from tools.faults import Planter
from tools.mutate import KERNELS, NOT_HERE, ROOT

SOURCE = """
__device__ void f(uint32_t n, uint32_t end) {  // n < end
  constexpr bool kSmall = sizeof(n) < 8;
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = n;
  const uint32_t most = n < end ? n : end;
  for (uint32_t i = n; i < end; ++i) {
    if (i >= most && kSmall) break;
    __syncthreads();
  }
}
"""
PLANTED = """
__device__ void f(uint32_t n, uint32_t end) {  // n < end
  constexpr bool kSmall = sizeof(n) < 8;
#pragma unroll
  for (int i = 0; i < 8; ++i) { if (!planted(7)) { values[i] = n; } }
  const uint32_t most = (planted(2) || (!planted(3) && (n < end))) ? n : end;
  for (uint32_t i = n; lt(4, i , end); ++i) {
    if ((planted(0) || (!planted(1) && ((planted(6) || (ge(5, i ,  most))) && kSmall)))) break;
    __syncthreads();
  }
}
"""


def test_faults_of_a_text():
    """Conditions, operands, bounds and statements; not what is known when compiling, a barrier, the smaller of two."""
    planter = Planter("f.cuh", SOURCE, 0)
    assert planter.text() == PLANTED
    assert [f"{fault.line} {fault.what}: {fault.text}" for fault in planter.faults] == [
        "8 if always: i >= most && kSmall",
        "8 if never: i >= most && kSmall",
        "6 ? always: n < end",
        "6 ? never: n < end",
        "7 < off by one: i < end",
        "8 >= off by one: i >= most",
        "8 && without: i >= most",
        "5 missing: values[i] = n;",
    ]


def test_every_equivalent_fault_is_there():
    """A reason that stays behind when its check has gone would excuse the next one that reads the same."""
    files = [file for file in (ROOT / KERNELS).glob("*.cuh") if file.name not in NOT_HERE]
    faults = Counter(str(fault) for file in files for fault in Planter(file.name, file.read_text(), 0).faults)
    assert not EQUIVALENT.keys() - faults.keys()
    assert set(faults.values()) == {1}
