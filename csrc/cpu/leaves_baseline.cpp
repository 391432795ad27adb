// The leaves for whatever the compiler targets by default: SSE2 on x86-64, NEON on arm64. Also asks the machine,
// once, what it can run.
#include <c10/util/Half.h>

#include "cpu/leaves.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace bnfused::cpu::baseline {
#include "cpu/vec.h"
// vec.h first: the others are written in its terms.
#include "cpu/epilogue.h"
#include "cpu/leaves_impl.h"
}  // namespace bnfused::cpu::baseline

namespace bnfused::cpu {

Capability capability() {
#if defined(BNFUSED_X86_DISPATCH)
  static const Capability best = [] {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      return Capability::kAvx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Capability::kAvx2;
    return Capability::kBaseline;
  }();
  return best;
#else
  return Capability::kBaseline;
#endif
}

const char* capability_name() {
  switch (capability()) {
    case Capability::kAvx512:
      return "AVX512";
    case Capability::kAvx2:
      return "AVX2";
    case Capability::kBaseline:
      break;
  }
  return "baseline";
}

}  // namespace bnfused::cpu
