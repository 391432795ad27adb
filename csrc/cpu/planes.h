// The planes traversal: a channel is `outer` runs of `inner` values, which may be cut into parts (Part, in plan.h).
#pragma once
#include "cpu/driver.h"

namespace bnfused::cpu {

inline Runs runs_of(const Problem& p, const Part& part) {
  return {part.plane_end - part.plane_begin, part.end - part.begin, p.channels * p.inner,
          p.channels * ((p.inner + 7) / 8)};
}

// The same planes from the last to the first: the values that were read last are written first, out of the cache.
inline Runs reversed_runs_of(const Problem& p, const Part& part) {
  const Runs r = runs_of(p, part);
  return {r.count, r.length, -r.stride, -r.mask_stride};
}

}  // namespace bnfused::cpu
