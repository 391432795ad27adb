// Checks of the arguments of an op. Every error has the form "op: expected X, got Y".
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

#include "batch_norm.h"

namespace bnfused::ops {

using OptionalTensor = std::optional<at::Tensor>;

inline DType dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kFloat:
      return DType::kFloat32;
    default:
      return DType::kFloat64;
  }
}

// The name that Python has for it: float32, not Float.
inline std::string name_of(at::ScalarType dtype) { return std::string(c10::getDtypeNames(dtype).first); }

// Checks the arguments of one call against x, and x itself. Every message begins with `op`, the name of the op.
class Checker {
 public:
  Checker(const char* op, const at::Tensor& x) : op_(op), x_(x) {
    TORCH_CHECK(x.layout() == at::kStrided, op_, ": expected x to be a dense (strided) tensor, got ", x.layout());
    TORCH_CHECK(x.dim() >= 2, op_, ": expected x of shape [N, C, ...], got ", x.sizes());
    const auto t = x.scalar_type();
    TORCH_CHECK(t == at::kHalf || t == at::kBFloat16 || t == at::kFloat || t == at::kDouble, op_,
                ": expected x of float16, bfloat16, float32 or float64, got ", name_of(t));
  }

  void per_channel(const OptionalTensor& t, const char* name) const {
    if (!t) return;
    TORCH_CHECK(t->dim() == 1 && t->size(0) == x_.size(1), op_, ": expected ", name, " of shape [", x_.size(1),
                "], got ", t->sizes());
    const auto own = x_.scalar_type(), wide = own == at::kDouble ? at::kDouble : at::kFloat;
    TORCH_CHECK(t->scalar_type() == own || t->scalar_type() == wide, op_, ": expected ", name, " of ", name_of(wide),
                own == wide ? "" : " or " + name_of(own), " beside x of ", name_of(own), ", got ",
                name_of(t->scalar_type()));
    device(*t, name);
  }

  void count(const OptionalTensor& t) const {
    if (!t) return;
    TORCH_CHECK(t->scalar_type() == at::kLong && t->numel() == 1, op_,
                ": expected num_batches_tracked to be one int64, got ", t->sizes(), " of ", name_of(t->scalar_type()));
    device(*t, "num_batches_tracked");
  }

  void like_x(const OptionalTensor& t, const char* name) const {
    if (!t) return;
    TORCH_CHECK(t->sizes() == x_.sizes(), op_, ": expected ", name, " of shape ", x_.sizes(), ", got ", t->sizes());
    TORCH_CHECK(t->scalar_type() == x_.scalar_type(), op_, ": expected ", name, " of ", name_of(x_.scalar_type()),
                ", got ", name_of(t->scalar_type()));
    TORCH_CHECK(t->layout() == at::kStrided, op_, ": expected ", name, " to be a dense (strided) tensor, got ",
                t->layout());
    device(*t, name);
  }

  void saved_statistic(const at::Tensor& t, const char* name) const {
    TORCH_CHECK(t.dim() == 1 && t.size(0) == x_.size(1) && t.scalar_type() == at::kDouble && t.is_contiguous(), op_,
                ": expected ", name, " of shape [", x_.size(1), "] and float64, got ", t.sizes(), " of ",
                name_of(t.scalar_type()));
    device(t, name);
  }

  void batch_sums(const at::Tensor& sums, const at::Tensor& count) const {
    TORCH_CHECK(sums.dim() == 2 && sums.size(0) == 2 && sums.size(1) == x_.size(1) &&
                    sums.scalar_type() == at::kDouble && sums.is_contiguous(),
                op_, ": expected sums of shape [2, ", x_.size(1), "] and float64, got ", sums.sizes(), " of ",
                name_of(sums.scalar_type()));
    device(sums, "sums");
    TORCH_CHECK(count.numel() == 1 && count.scalar_type() == at::kDouble, op_,
                ": expected count to be one float64, got ", count.sizes(), " of ", name_of(count.scalar_type()));
    device(count, "count");
  }

  Epilogue epilogue(int64_t activation, double param) const {
    TORCH_CHECK(activation >= 0 && activation < kActivations, op_, ": expected activation in [0, ", kActivations,
                "), got ", activation);
    return {static_cast<Activation>(activation), param};
  }

 private:
  void device(const at::Tensor& t, const char* name) const {
    TORCH_CHECK(t.device() == x_.device(), op_, ": expected ", name, " on ", x_.device(), ", got ", t.device());
  }

  const char* op_;
  const at::Tensor& x_;
};

}  // namespace bnfused::ops
