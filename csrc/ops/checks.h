// Checks of the arguments of an op. Every error has the form "op: expected X, got Y".
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

#include "batch_norm.h"

namespace bnfused::ops {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& tensor) {
  const auto t = tensor.scalar_type();
  return t == at::kHalf       ? DType::kFloat16
         : t == at::kBFloat16 ? DType::kBFloat16
         : t == at::kFloat    ? DType::kFloat32
                              : DType::kFloat64;
}

inline bool is_supported(at::ScalarType t) {
  return t == at::kHalf || t == at::kBFloat16 || t == at::kFloat || t == at::kDouble;
}

// The dtype's name in Python: float32, not Float.
inline std::string name_of(at::ScalarType dtype) { return std::string(c10::getDtypeNames(dtype).first); }

// Checks x, and the other arguments of the call against x. Every message begins with `op`, the name of the op.
class Checker {
 public:
  Checker(const char* op, const Tensor& x) : op_(op), x_(x) {
    TORCH_CHECK(x.layout() == at::kStrided, op_, ": expected x to be a dense (strided) tensor, got ", x.layout());
    TORCH_CHECK(x.dim() >= 2, op_, ": expected x of shape [N, C, ...], got ", x.sizes());
    TORCH_CHECK(is_supported(x.scalar_type()), op_, ": expected x of float16, bfloat16, float32 or float64, got ",
                name_of(x.scalar_type()));
  }

  void shape(const Tensor& t, const char* name, at::IntArrayRef sizes) const {
    TORCH_CHECK(t.sizes() == sizes, op_, ": expected ", name, " of shape ", sizes, ", got ", t.sizes());
  }
  void device(const Tensor& t, const char* name) const {
    TORCH_CHECK(t.device() == x_.device(), op_, ": expected ", name, " on ", x_.device(), ", got ", t.device());
  }

  void per_channel(const OptionalTensor& t, const char* name) const {
    if (!t) return;
    shape(*t, name, x_.size(1));
    const auto own = x_.scalar_type(), wide = own == at::kDouble ? at::kDouble : at::kFloat;
    TORCH_CHECK(t->scalar_type() == own || t->scalar_type() == wide, op_, ": expected ", name, " of ", name_of(wide),
                own == wide ? "" : " or " + name_of(own), " with x of ", name_of(own), ", got ",
                name_of(t->scalar_type()));
    device(*t, name);
  }

  void count(const OptionalTensor& t) const {
    if (t) single_value(*t, "num_batches_tracked", at::kLong);
  }

  void like_x(const OptionalTensor& t, const char* name) const {
    if (!t) return;
    shape(*t, name, x_.sizes());
    TORCH_CHECK(t->scalar_type() == x_.scalar_type(), op_, ": expected ", name, " of ", name_of(x_.scalar_type()),
                ", got ", name_of(t->scalar_type()));
    TORCH_CHECK(t->layout() == at::kStrided, op_, ": expected ", name, " to be a dense (strided) tensor, got ",
                t->layout());
    device(*t, name);
  }

  void saved_statistic(const Tensor& t, const char* name) const { float64(t, name, x_.size(1)); }

  void batch_sums(const Tensor& sums, const Tensor& count) const {
    float64(sums, "sums", {2, x_.size(1)});
    single_value(count, "count", at::kDouble);
  }

  Epilogue epilogue(int64_t activation, double param) const {
    TORCH_CHECK(activation >= 0 && activation < kActivations, op_, ": expected activation in [0, ", kActivations,
                "), got ", activation);
    return {static_cast<Activation>(activation), param};
  }

 private:
  void float64(const Tensor& t, const char* name, at::IntArrayRef sizes) const {
    TORCH_CHECK(t.sizes() == sizes && t.scalar_type() == at::kDouble && t.is_contiguous(), op_, ": expected ", name,
                " of shape ", sizes, " and float64, got ", t.sizes(), " of ", name_of(t.scalar_type()));
    device(t, name);
  }

  void single_value(const Tensor& t, const char* name, at::ScalarType dtype) const {
    TORCH_CHECK(t.numel() == 1 && t.scalar_type() == dtype, op_, ": expected ", name, " to be one ", name_of(dtype),
                ", got ", t.sizes(), " of ", name_of(t.scalar_type()));
    device(t, name);
  }

  const char* op_;
  const Tensor& x_;
};

}  // namespace bnfused::ops
