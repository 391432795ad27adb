// What the loops need to know of the machine that they run on.
#include "cpu/leaves.h"

#include <ATen/Version.h>

#include <string>

namespace bnfused::cpu {

Capability capability() {
  // Torch answers with the best that this machine has, or with what ATEN_CPU_CAPABILITY allows.
  static const Capability best = [] {
#if defined(BNFUSED_X86_DISPATCH)
    const std::string torchs = at::get_cpu_capability();
    if (torchs == "AVX512" && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      return __builtin_cpu_supports("avx512bf16") ? Capability::kAvx512Bf16 : Capability::kAvx512;
    }
    if (torchs == "AVX512" || torchs == "AVX2") return Capability::kAvx2;
#endif
    return Capability::kBaseline;
  }();
  return best;
}

const char* capability_name() {
  switch (capability()) {
    case Capability::kAvx512Bf16:
      return "AVX512_BF16";
    case Capability::kAvx512:
      return "AVX512";
    case Capability::kAvx2:
      return "AVX2";
    case Capability::kBaseline:
      break;
  }
  return "baseline";
}

int64_t store_ahead() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const int64_t bytes = __builtin_cpu_is("intel") ? 4096 : 0;
  return bytes;
#else
  return 0;
#endif
}

}  // namespace bnfused::cpu
