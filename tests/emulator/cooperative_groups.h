// The grid and cluster groups of the emulated device. The include path has this before CUDA's header of the same name.
#pragma once
#include "emulated_device.h"

namespace cooperative_groups {

struct grid_group {
  void sync(BNFUSED_AT) const { bnfused::emulator::grid_barrier(at); }
  unsigned long long size() const { return 1ull * gridDim.x * blockDim.x; }
};

struct cluster_group {
  void sync(BNFUSED_AT) const { bnfused::emulator::cluster_barrier(num_blocks(), at); }
  unsigned block_rank() const { return bnfused::emulator::cluster_rank(); }
  unsigned num_blocks() const { return bnfused::emulator::cluster_size(); }
  template <class T>
  T* map_shared_rank(T* p, unsigned rank, BNFUSED_AT) const {
    return static_cast<T*>(bnfused::emulator::shared_of_rank(p, rank, at));
  }
};

inline grid_group this_grid() { return {}; }
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
