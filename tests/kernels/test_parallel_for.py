"""``parallel_for`` of csrc/cpu/driver.h, as compilers build it whose OpenMP is not torch's.

g++ without -fopenmp takes the same branch as clang. The rest of the suite runs the other one.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = r"""
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <mutex>
#include <set>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cpu/driver.h"

#ifdef _OPENMP
#error "this program is for the branch without OpenMP"
#endif

using bnfused::cpu::parallel_for;

int main() {
  at::set_num_threads(3);
  for (const int64_t begin : {0, 5}) {
    for (const int64_t size : {0, 1, 2, 3, 4, 7, 100, 1001}) {
      for (const int64_t grain : {0, 1, 2, 3, 50, 2000}) {
        std::vector<std::atomic<int>> visits(begin + size + 8);
        std::mutex mutex;
        std::set<std::thread::id> threads;
        parallel_for(begin, begin + size, grain, [&](int64_t first, int64_t last) {
          for (int64_t i = first; i < last; ++i) ++visits.at(i);
          const std::lock_guard<std::mutex> lock(mutex);
          threads.insert(std::this_thread::get_id());
        });
        for (int64_t i = 0; i < int64_t(visits.size()); ++i) {
          const bool inside = i >= begin && i < begin + size;
          if (visits[i] != int(inside)) {
            std::printf("[%ld, %ld), grain %ld: %ld was visited %d times\n", long(begin), long(begin + size),
                        long(grain), long(i), int(visits[i]));
          }
        }
        // Cut as at::parallel_for cuts, so that results do not depend on the compiler.
        const int64_t at_least = std::max<int64_t>(grain, 1);
        const int64_t most = std::clamp<int64_t>((size + at_least - 1) / at_least, 1, 3);
        const int64_t part = (size + most - 1) / most;
        if (int64_t(threads.size()) != (size == 0 ? 0 : (size + part - 1) / part)) {
          std::printf("%ld values, grain %ld: %zu threads\n", long(size), long(grain), threads.size());
        }
      }
    }
  }
  try {
    parallel_for(0, 100, 1, [](int64_t first, int64_t) {
      if (first > 0) throw std::runtime_error("from a thread");
    });
    std::printf("no exception\n");
  } catch (const std::runtime_error& error) {
    std::printf("%s\n", error.what());
  }
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parallel_for")
    (folder / "main.cpp").write_text(PROGRAM)
    libraries = Path(torch.__file__).parent / "lib"
    command = [
        *shlex.split(os.environ.get("CXX", "c++")),
        *("-std=c++20", "-O1", "-Wno-psabi", f"-I{ROOT / 'csrc'}", "main.cpp", "-o", "main"),
        *(f"-isystem{path}" for path in cpp_extension.include_paths()),
        *(f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch_cpu", "-lc10", *map(str, libraries.glob("libgomp*"))),
    ]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder / "main"


def test_every_index_is_visited_once_on_the_threads_of_torch(program: Path) -> None:
    """It prints each index that was visited more or less than once, and the text of an exception from a thread."""
    result = subprocess.run([program], capture_output=True, text=True)
    assert (result.stdout, result.stderr, result.returncode) == ("from a thread\n", "", 0)
