// The schedules under which the programs of this folder run a kernel. A fault that one schedule hides shows in another.
#pragma once
#include "emulator.h"

namespace bnfused::emulator {

struct Schedule {
  const char* name;
  Order order;
  uint64_t seed;
  unsigned resident_blocks;
  bool early_copies;

  void choose() const {
    options.order = order;
    options.seed = seed;
    options.resident_blocks = resident_blocks;
    options.early_copies = early_copies;
  }
};

// If one block runs after the other, a kernel fails that needs other blocks to be resident. Odd seeds mix all threads.
// Even seeds mostly mix blocks.
constexpr Schedule kSchedules[] = {
    {"forward", Order::kForward, 1, 1, false}, {"reverse", Order::kReverse, 1, 1, true},
    {"random1", Order::kRandom, 1, 4, false},  {"random2", Order::kRandom, 2, 4, false},
    {"random3", Order::kRandom, 3, 4, false},  {"random4", Order::kRandom, 4, 4, false},
};

}  // namespace bnfused::emulator
