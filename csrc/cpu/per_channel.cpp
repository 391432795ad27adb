// Values per channel in the dtypes that per_channel.h does not inline.
#include "cpu/per_channel.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

namespace bnfused::cpu {

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

}  // namespace bnfused::cpu
