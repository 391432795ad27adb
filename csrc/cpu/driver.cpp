// See driver.h.
#include "cpu/driver.h"

#include <ATen/Version.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <string>

namespace bnfused::cpu {

Capability capability() {
  // Torch's own answer: the best that this machine has, or what ATEN_CPU_CAPABILITY allows.
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

double read_other(const PerChannel& values, int64_t channel) {
  switch (values.dtype) {
    case DType::kFloat16:
      return static_cast<const c10::Half*>(values.data)[channel];
    case DType::kBFloat16:
      return static_cast<const c10::BFloat16*>(values.data)[channel];
    default:
      return static_cast<const double*>(values.data)[channel];
  }
}

void write_other(const PerChannel& values, int64_t channel, double value) {
  switch (values.dtype) {
    case DType::kFloat16:
      static_cast<c10::Half*>(values.data)[channel] = static_cast<float>(value);
      return;
    case DType::kBFloat16:
      static_cast<c10::BFloat16*>(values.data)[channel] = static_cast<float>(value);
      return;
    default:
      static_cast<double*>(values.data)[channel] = value;
  }
}

int64_t store_ahead() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const int64_t bytes = __builtin_cpu_is("intel") ? 4096 : 0;
  return bytes;
#else
  return 0;
#endif
}

RowView row_view(const Problem& p, int64_t at_least, bool with_mask) {
  constexpr int64_t kFewChannels = 256;  // below this the wider sums of several rows still fit L1
  int64_t together = 1;
  if (p.channels < kFewChannels) {
    together = kMaxLanes / std::gcd(p.channels, kMaxLanes);
    while (together * p.channels < at_least) together *= 2;
  } else if (with_mask) {
    together = 8 / std::gcd<int64_t>(p.channels, 8);  // every row of the mask starts on a byte
  }
  const int64_t columns = together * p.channels;
  return {columns, p.numel() / columns, p.numel() % columns};
}

}  // namespace bnfused::cpu
