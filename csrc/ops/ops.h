// The ops, written once for every backend: checks, allocation, saved tensors. Every check comes before any allocation
// or write, so an error leaves the running statistics unchanged.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_native.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>

#include "batch_norm.h"
#include "ops/checks.h"
#include "ops/memory_order.h"

namespace bnfused::ops {

// The functions that a backend has. These do nothing: python.cpp needs the ops' signatures, which are the same for
// every backend.
struct NoBackend {
  static void batch_norm_train(const TrainArgs&, c10::Device) {}
  static void batch_norm_apply(const ApplyArgs&, c10::Device) {}
  static void batch_norm_backward(const BackwardArgs&, c10::Device) {}
  static void batch_norm_stats(const MomentsArgs&, c10::Device) {}
  static void batch_norm_gather_stats(const GatherArgs&, c10::Device) {}
  static Tensor empty_like(const Tensor& x) { return x; }
  static void copy(const Tensor& /*from*/, const Tensor& /*to*/) {}  // same shape, any memory order
};

inline const void* data_of(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

inline OptionalTensor contiguous(const OptionalTensor& t) { return t ? OptionalTensor(t->contiguous()) : std::nullopt; }

inline PerChannel written(const OptionalTensor& t) {
  return t ? PerChannel{t->mutable_data_ptr(), dtype_of(*t)} : PerChannel{};
}

// PerChannel serves for reading too. The const_cast is safe: a backend never writes to what it gets from here.
inline PerChannel read(const OptionalTensor& t) {
  return t ? PerChannel{const_cast<void*>(t->const_data_ptr()), dtype_of(*t)} : PerChannel{};
}

// If `t` was not contiguous, the backend wrote to a copy. This writes the result back to `t`.
inline void copy_back(const OptionalTensor& copy, const OptionalTensor& t) {
  if (t && !copy->is_same(*t)) t->copy_(*copy);
}

// An uninitialized tensor on the device of x. On the CPU this skips the dispatcher, which takes about as long as the
// allocation itself: a training step allocates eight tensors, and on a small tensor little else takes time.
inline Tensor new_empty(const Tensor& x, at::IntArrayRef sizes, at::ScalarType dtype) {
  if (x.is_cpu()) return at::native::empty_cpu(sizes, dtype);
  return at::empty(sizes, x.options().dtype(dtype));
}

struct Saved {
  Tensor mean, invstd, mask;
};

inline Saved allocate_saved(const Tensor& x, const Problem& p, const Epilogue& epilogue, bool has_residual) {
  const bool has_mask = epilogue.activation == Activation::kReLU && has_residual;
  return {new_empty(x, {p.channels}, at::kDouble), new_empty(x, {p.channels}, at::kDouble),
          new_empty(x, {has_mask ? mask_bytes(p) : 0}, at::kByte)};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_train(
    const Tensor& x_in, const OptionalTensor& weight_in, const OptionalTensor& bias_in,
    const OptionalTensor& running_mean_in, const OptionalTensor& running_var_in,
    const OptionalTensor& num_batches_tracked, const OptionalTensor& residual_in, std::optional<double> momentum,
    double eps, int64_t activation, double activation_param) {
  const char* op = "bnfused::batch_norm_train";
  const Checker check(op, x_in);
  check.per_channel(weight_in, "weight");
  check.per_channel(bias_in, "bias");
  check.per_channel(running_mean_in, "running_mean");
  check.per_channel(running_var_in, "running_var");
  check.count(num_batches_tracked);
  check.like_x(residual_in, "residual");
  const Epilogue epilogue = check.epilogue(activation, activation_param);
  TORCH_CHECK(momentum || num_batches_tracked, op, ": expected num_batches_tracked if momentum is None, got None");
  TORCH_CHECK(eps > 0, op, ": expected eps to be positive, got ", eps);

  const Tensor x = dense(x_in);
  const Problem p = problem_of(x);
  TORCH_CHECK_VALUE(p.values_per_channel() != 1 || p.channels == 0,
                    "Expected more than 1 value per channel when training, got input size torch.Size(", x.sizes(), ")");
  const OptionalTensor residual = in_order_of<Backend>(residual_in, x);
  const OptionalTensor weight = contiguous(weight_in), bias = contiguous(bias_in);
  const OptionalTensor running_mean = contiguous(running_mean_in), running_var = contiguous(running_var_in);
  const Tensor y = Backend::empty_like(x);
  const Saved saved = allocate_saved(x, p, epilogue, residual.has_value());

  TrainArgs args{};
  args.problem = p;
  args.x = x.const_data_ptr();
  args.residual = data_of(residual);
  args.y = y.mutable_data_ptr();
  args.mask = saved.mask.numel() ? saved.mask.mutable_data_ptr<uint8_t>() : nullptr;
  args.weight = read(weight);
  args.bias = read(bias);
  args.running_mean = written(running_mean);
  args.running_var = written(running_var);
  args.num_batches_tracked = num_batches_tracked ? num_batches_tracked->mutable_data_ptr<int64_t>() : nullptr;
  args.mean = saved.mean.mutable_data_ptr<double>();
  args.invstd = saved.invstd.mutable_data_ptr<double>();
  args.eps = eps;
  args.momentum = momentum.value_or(0);
  args.cumulative = !momentum.has_value();
  args.epilogue = epilogue;
  Backend::batch_norm_train(args, x.device());
  copy_back(running_mean, running_mean_in);
  copy_back(running_var, running_var_in);
  return {y, saved.mean, saved.invstd, saved.mask};
}

// Normalizes x with given statistics, for batch_norm_eval, batch_norm_frozen and batch_norm_apply. Fills `saved` with
// what the backward needs, unless it is nullptr.
template <class Backend>
Tensor apply_statistics(const char* op, const Tensor& x_in, const OptionalTensor& weight_in,
                        const OptionalTensor& bias_in, const Tensor& mean_in, const Tensor& var_in,
                        const OptionalTensor& residual_in, double eps, int64_t activation, double activation_param,
                        Saved* saved, bool exact_statistics = false) {
  const Checker check(op, x_in);
  check.per_channel(weight_in, "weight");
  check.per_channel(bias_in, "bias");
  if (exact_statistics) {
    check.saved_statistic(mean_in, "mean");
    check.saved_statistic(var_in, "var");
  } else {
    check.per_channel(mean_in, "running_mean");
    check.per_channel(var_in, "running_var");
  }
  check.like_x(residual_in, "residual");
  const Epilogue epilogue = check.epilogue(activation, activation_param);
  TORCH_CHECK(eps >= 0, op, ": expected eps to be non-negative, got ", eps);

  const Tensor x = dense(x_in);
  const Problem p = problem_of(x);
  const OptionalTensor residual = in_order_of<Backend>(residual_in, x);
  const OptionalTensor weight = contiguous(weight_in), bias = contiguous(bias_in);
  const OptionalTensor mean = mean_in.contiguous(), var = var_in.contiguous();
  const Tensor y = Backend::empty_like(x);

  ApplyArgs args{};
  args.problem = p;
  args.x = x.const_data_ptr();
  args.residual = data_of(residual);
  args.y = y.mutable_data_ptr();
  args.weight = read(weight);
  args.bias = read(bias);
  args.running_mean = read(mean);
  args.running_var = read(var);
  args.eps = eps;
  args.epilogue = epilogue;
  if (saved) {
    *saved = allocate_saved(x, p, epilogue, residual.has_value());
    args.mask = saved->mask.numel() ? saved->mask.mutable_data_ptr<uint8_t>() : nullptr;
    args.mean = saved->mean.mutable_data_ptr<double>();
    args.invstd = saved->invstd.mutable_data_ptr<double>();
  }
  Backend::batch_norm_apply(args, x.device());
  return y;
}

template <class Backend>
Tensor batch_norm_eval(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                       const Tensor& running_mean, const Tensor& running_var, const OptionalTensor& residual,
                       double eps, int64_t activation, double activation_param) {
  return apply_statistics<Backend>("bnfused::batch_norm_eval", x, weight, bias, running_mean, running_var, residual,
                                   eps, activation, activation_param, nullptr);
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_frozen(const Tensor& x, const OptionalTensor& weight,
                                                             const OptionalTensor& bias, const Tensor& running_mean,
                                                             const Tensor& running_var, const OptionalTensor& residual,
                                                             double eps, int64_t activation, double activation_param) {
  Saved saved;
  Tensor y = apply_statistics<Backend>("bnfused::batch_norm_frozen", x, weight, bias, running_mean, running_var,
                                       residual, eps, activation, activation_param, &saved);
  return {y, saved.mean, saved.invstd, saved.mask};
}

template <class Backend>
Tensor batch_norm_stats(const Tensor& x_in) {
  const Checker check("bnfused::batch_norm_stats", x_in);
  const Tensor x = dense(x_in);
  const Problem p = problem_of(x);
  const auto dtype = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor moments = new_empty(x, {packed_size(p.channels, dtype == at::kDouble)}, dtype);
  Backend::batch_norm_stats(
      {p, x.const_data_ptr(), packed_at(moments.mutable_data_ptr(), p.channels, dtype_of(moments))}, x.device());
  return moments;
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> batch_norm_gather_stats(
    const Tensor& moments_in, const OptionalTensor& running_mean_in, const OptionalTensor& running_var_in,
    const OptionalTensor& num_batches_tracked, const OptionalTensor& merged, std::optional<double> momentum) {
  const char* op = "bnfused::batch_norm_gather_stats";
  const auto dtype = moments_in.scalar_type();
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kDouble, op, ": expected moments of float32 or float64, got ",
              name_of(dtype));
  const int64_t size = moments_in.dim() == 2 ? moments_in.size(1) : 0;
  const bool of_float64 = dtype == at::kDouble;
  const int64_t channels = of_float64 ? (size - 1) / 2 : (size - 2) / 3;
  TORCH_CHECK(size > 0 && size == packed_size(channels, of_float64), op, ": expected moments of shape [parts, ",
              of_float64 ? "2 C + 1" : "3 C + 2", "], got ", moments_in.sizes());
  const Checker check(op, moments_in);
  const auto expect_running = [&](const OptionalTensor& t, const char* name) {
    if (!t) return;
    check.shape(*t, name, channels);
    TORCH_CHECK(is_supported(t->scalar_type()), op, ": expected ", name,
                " of float16, bfloat16, float32 or float64, got ", name_of(t->scalar_type()));
    check.device(*t, name);
  };
  expect_running(running_mean_in, "running_mean");
  expect_running(running_var_in, "running_var");
  check.count(num_batches_tracked);
  if (merged) {
    check.shape(*merged, "merged", size);
    TORCH_CHECK(merged->scalar_type() == dtype, op, ": expected merged of the dtype of moments, got ",
                name_of(merged->scalar_type()));
    check.device(*merged, "merged");
    TORCH_CHECK(merged->is_contiguous(), op, ": expected merged to be contiguous");
  }
  TORCH_CHECK(momentum || num_batches_tracked, op, ": expected num_batches_tracked if momentum is None, got None");

  const Tensor moments = moments_in.contiguous();
  const OptionalTensor running_mean = contiguous(running_mean_in), running_var = contiguous(running_var_in);
  const Tensor batch_mean = new_empty(moments, {channels}, at::kDouble);
  const Tensor batch_var = new_empty(moments, {channels}, at::kDouble);
  const Tensor batch_count = new_empty(moments, {}, at::kDouble);

  GatherArgs args{};
  args.parts = moments.size(0);
  args.channels = channels;
  args.moments = packed_at(const_cast<void*>(moments.const_data_ptr()), channels, dtype_of(moments));  // as read()
  args.stride = size;
  if (merged) args.merged = packed_at(merged->mutable_data_ptr(), channels, dtype_of(moments));
  args.running_mean = written(running_mean);
  args.running_var = written(running_var);
  args.num_batches_tracked = num_batches_tracked ? num_batches_tracked->mutable_data_ptr<int64_t>() : nullptr;
  args.batch_mean = batch_mean.mutable_data_ptr<double>();
  args.batch_var = batch_var.mutable_data_ptr<double>();
  args.batch_count = batch_count.mutable_data_ptr<double>();
  args.momentum = momentum.value_or(0);
  args.cumulative = !momentum.has_value();
  Backend::batch_norm_gather_stats(args, moments.device());
  copy_back(running_mean, running_mean_in);
  copy_back(running_var, running_var_in);
  return {batch_mean, batch_var, batch_count};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> batch_norm_apply(const Tensor& x, const OptionalTensor& weight,
                                                    const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
                                                    const OptionalTensor& residual, double eps, int64_t activation,
                                                    double activation_param) {
  Saved saved;
  Tensor y = apply_statistics<Backend>("bnfused::batch_norm_apply", x, weight, bias, mean, var, residual, eps,
                                       activation, activation_param, &saved, /*exact_statistics=*/true);
  return {y, saved.invstd, saved.mask};
}

// The sums of g and of g * xhat over the whole batch, of which x is a part, and how many values it has per channel.
struct BatchSums {
  const Tensor &sums, &count;
};

// The two rows of `sums`, which has shape [2, C]: the sums of g, and those of g * xhat.
inline std::tuple<PerChannel, PerChannel> split_sums(const Tensor& sums) {
  char* data = static_cast<char*>(const_cast<void*>(sums.const_data_ptr()));
  return {{data, dtype_of(sums)}, {data + sums.size(1) * sums.element_size(), dtype_of(sums)}};
}

// Computes the three backward ops. `of_batch` has the sums over the whole batch; if it is nullptr, they are computed
// from x. `sums_of_x` is where the sums over x are written; if it is nullptr, they are only used.
template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward_with(
    const char* op, const BatchSums* of_batch, const Tensor* sums_of_x, const Tensor& grad_y_in, const Tensor& x_in,
    const OptionalTensor& weight_in, const OptionalTensor& bias_in, const OptionalTensor& residual_in,
    const Tensor& mean, const Tensor& invstd, const OptionalTensor& mask, int64_t activation, double activation_param,
    bool training, std::array<bool, 4> output_mask) {
  const Checker check(op, x_in);
  check.like_x(grad_y_in, "grad_y");
  check.per_channel(weight_in, "weight");
  check.per_channel(bias_in, "bias");
  check.like_x(residual_in, "residual");
  check.saved_statistic(mean, "mean");
  check.saved_statistic(invstd, "invstd");
  if (of_batch) check.batch_sums(of_batch->sums, of_batch->count);
  const Epilogue epilogue = check.epilogue(activation, activation_param);
  const auto [need_x, need_weight, need_bias, need_residual] = output_mask;

  const Tensor x = dense(x_in);
  const Problem p = problem_of(x);
  // The mask tells ReLU's gradient all that it needs to know about the residual, so the caller may omit the residual.
  const bool use_mask = epilogue.activation == Activation::kReLU && (residual_in || (mask && mask->numel() != 0));
  if (use_mask) {
    TORCH_CHECK(mask && mask->scalar_type() == at::kByte && mask->numel() == mask_bytes(p) && mask->is_contiguous(), op,
                ": expected mask of ", mask_bytes(p), " bytes for ReLU with a residual, got ",
                mask ? mask->numel() : 0);
  }
  const Tensor grad_y = in_order_of<Backend>(grad_y_in, x);
  const OptionalTensor residual = use_mask ? OptionalTensor{} : in_order_of<Backend>(residual_in, x);
  const OptionalTensor weight = contiguous(weight_in), bias = contiguous(bias_in);

  const auto parameter = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto like_parameter = [&](const OptionalTensor& t, bool needed) {
    return new_empty(x, {needed ? p.channels : 0}, t ? t->scalar_type() : parameter);
  };
  const auto like_x = [&](bool needed) { return needed ? Backend::empty_like(x) : new_empty(x, {0}, x.scalar_type()); };
  const Tensor grad_x = like_x(need_x), grad_residual = like_x(need_residual);
  const Tensor grad_weight = like_parameter(weight, need_weight);
  const Tensor grad_bias = like_parameter(bias, need_bias);

  BackwardArgs args{};
  args.problem = p;
  args.grad_y = grad_y.const_data_ptr();
  args.x = x.const_data_ptr();
  args.residual = data_of(residual);
  args.mask = use_mask ? mask->const_data_ptr<uint8_t>() : nullptr;
  args.weight = read(weight);
  args.bias = read(bias);
  args.mean = mean.const_data_ptr<double>();
  args.invstd = invstd.const_data_ptr<double>();
  args.training = training;
  if (of_batch) {
    std::tie(args.sum_grad, args.sum_grad_xhat) = split_sums(of_batch->sums);
    args.batch_count = of_batch->count.const_data_ptr<double>();
  }
  args.grad_x = need_x ? grad_x.mutable_data_ptr() : nullptr;
  args.grad_residual = need_residual ? grad_residual.mutable_data_ptr() : nullptr;
  if (need_weight) args.grad_weight = written(grad_weight);
  if (need_bias) args.grad_bias = written(grad_bias);
  if (sums_of_x) std::tie(args.grad_bias, args.grad_weight) = split_sums(*sums_of_x);
  args.epilogue = epilogue;
  Backend::batch_norm_backward(args, x.device());
  return {grad_x, grad_weight, grad_bias, grad_residual};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward(const Tensor& grad_y, const Tensor& x,
                                                               const OptionalTensor& weight, const OptionalTensor& bias,
                                                               const OptionalTensor& residual, const Tensor& mean,
                                                               const Tensor& invstd, const OptionalTensor& mask,
                                                               int64_t activation, double activation_param,
                                                               bool training, std::array<bool, 4> output_mask) {
  return batch_norm_backward_with<Backend>("bnfused::batch_norm_backward", nullptr, nullptr, grad_y, x, weight, bias,
                                           residual, mean, invstd, mask, activation, activation_param, training,
                                           output_mask);
}

template <class Backend>
Tensor batch_norm_backward_reduce(const Tensor& grad_y, const Tensor& x, const OptionalTensor& weight,
                                  const OptionalTensor& bias, const OptionalTensor& residual, const Tensor& mean,
                                  const Tensor& invstd, const OptionalTensor& mask, int64_t activation,
                                  double activation_param) {
  const char* op = "bnfused::batch_norm_backward_reduce";
  const Checker check(op, x);  // before x's size is used
  const Tensor sums = new_empty(x, {2, x.size(1)}, at::kDouble);
  batch_norm_backward_with<Backend>(op, nullptr, &sums, grad_y, x, weight, bias, residual, mean, invstd, mask,
                                    activation, activation_param, /*training=*/false, {false, false, false, false});
  return sums;
}

template <class Backend>
std::tuple<Tensor, Tensor> batch_norm_backward_apply(const Tensor& grad_y, const Tensor& x,
                                                     const OptionalTensor& weight, const OptionalTensor& bias,
                                                     const OptionalTensor& residual, const Tensor& mean,
                                                     const Tensor& invstd, const OptionalTensor& mask,
                                                     const Tensor& sums, const Tensor& count, int64_t activation,
                                                     double activation_param, std::array<bool, 2> output_mask) {
  const BatchSums of_batch{sums, count};
  const auto [grad_x, grad_weight, grad_bias, grad_residual] = batch_norm_backward_with<Backend>(
      "bnfused::batch_norm_backward_apply", &of_batch, nullptr, grad_y, x, weight, bias, residual, mean, invstd, mask,
      activation, activation_param, /*training=*/true, {output_mask[0], false, false, output_mask[1]});
  return {grad_x, grad_residual};
}

template <class Signature>
struct Op {
  const char* name;
  Signature* function;
};

// Every op of schema.cpp, with the function that computes it on a backend.
template <class Backend>
constexpr auto all_ops() {
  return std::tuple{
      Op{"batch_norm_train", batch_norm_train<Backend>},
      Op{"batch_norm_frozen", batch_norm_frozen<Backend>},
      Op{"batch_norm_eval", batch_norm_eval<Backend>},
      Op{"batch_norm_backward", batch_norm_backward<Backend>},
      Op{"batch_norm_stats", batch_norm_stats<Backend>},
      Op{"batch_norm_gather_stats", batch_norm_gather_stats<Backend>},
      Op{"batch_norm_apply", batch_norm_apply<Backend>},
      Op{"batch_norm_backward_reduce", batch_norm_backward_reduce<Backend>},
      Op{"batch_norm_backward_apply", batch_norm_backward_apply<Backend>},
  };
}

void define(torch::Library& m);  // schema.cpp

// Registers the backend for every op.
template <class Backend>
void implement(torch::Library& m) {
  std::apply([&](const auto&... op) { (m.impl(op.name, op.function), ...); }, all_ops<Backend>());
}

}  // namespace bnfused::ops
