// The bridge between the ops and the backends: plain types that every compiler may include. It needs only <cstdint>.
//
// A dense tensor (N, C, *) has `outer` x `channels` x `inner` values in memory order, whatever its strides are. NCHW is
// (N, C, H*W), channels_last and (N, C) are (rows, C, 1), and a tensor with C outermost is (1, C, rest).
#pragma once
#include <cstdint>

namespace bnfused {

enum class DType : int32_t { kFloat16, kBFloat16, kFloat32, kFloat64 };

// The codes are those of bnfused/activations.py.
enum class Activation : int32_t {
  kIdentity = 0,
  kReLU = 1,
  kReLU6 = 2,
  kLeakyReLU = 3,
  kELU = 4,
  kSiLU = 5,
  kGELU = 6,
  kHardswish = 7,
  kSigmoid = 8,
  kTanh = 9,
};
constexpr int kActivations = 10;

// kPlanes: a channel has `outer` planes of `inner` consecutive values. kRows: channels are innermost, and a row has one
// value of each channel.
enum class Layout : int32_t { kPlanes, kRows };

struct Problem {
  int64_t outer, channels, inner;
  DType dtype;

  constexpr int64_t values_per_channel() const { return outer * inner; }
  constexpr int64_t numel() const { return outer * channels * inner; }
};

// Bytes of the ReLU mask, which has one bit for each value. With channels innermost, the bits have no gaps. Otherwise
// every plane has whole bytes. Each backend chooses the order of the bits. bnfused/fake.py has the same rule.
constexpr int64_t mask_bytes(const Problem& p) {
  return p.inner == 1 ? (p.numel() + 7) / 8 : p.outer * p.channels * ((p.inner + 7) / 8);
}

// One value per channel, in the dtype in which its owner keeps it. data == nullptr means that the values are absent.
struct PerChannel {
  void* data = nullptr;
  DType dtype = DType::kFloat32;

  explicit constexpr operator bool() const { return data != nullptr; }
};

struct Epilogue {
  Activation activation;
  double param;  // negative_slope of leaky_relu, alpha of elu
};

// The moments of a part of a batch as they travel between processes. For a float64 batch they are float64. Otherwise
// they are float32, and the mean and the count are sums of two values, which have 48 bits. The standard deviation
// sqrt(m2 / count) travels, because it has the range of x. m2 would overflow for x above 1e19, and be 0 below 1e-22.
struct PackedMoments {
  PerChannel mean, mean_rest, deviation;  // (channels), one after the other; only float32 has the rests
  PerChannel count, count_rest;           // one value each, after them

  explicit constexpr operator bool() const { return bool(count); }
};

constexpr int64_t packed_size(int64_t channels, bool of_float64) {
  return of_float64 ? 2 * channels + 1 : 3 * channels + 2;
}

inline PackedMoments packed_at(void* data, int64_t channels, DType dtype) {
  const bool of_float64 = dtype == DType::kFloat64;
  const auto at = [&](int64_t i) -> PerChannel {
    return {static_cast<char*>(data) + i * int64_t(of_float64 ? sizeof(double) : sizeof(float)), dtype};
  };
  if (of_float64) return {at(0), {}, at(channels), at(2 * channels), {}};
  return {at(0), at(channels), at(2 * channels), at(3 * channels), at(3 * channels + 1)};
}

// What rounding a value to float32 loses. It is 0 if the value becomes infinite, because the sum of both would be NaN.
constexpr double rest_of(double value) {
  const double rest = value - double(float(value));
  return rest - rest == 0 ? rest : 0;
}

struct MomentsArgs {
  Problem problem;
  const void* x;
  PackedMoments moments;  // out
};

// Merges the moments of the parts of a batch. If a part has no values, its mean and deviation may have any value.
struct GatherArgs {
  int64_t parts, channels;
  PackedMoments moments;  // of the first part; those of the next part lie `stride` values further on
  int64_t stride;
  PackedMoments merged;                  // out, may be absent
  PerChannel running_mean, running_var;  // not changed if there are fewer than two values in all
  int64_t* num_batches_tracked;          // may be nullptr
  double *batch_mean, *batch_var;        // out, (channels); the variance is biased
  double* batch_count;                   // out, one value
  double momentum;
  bool cumulative;  // as in TrainArgs
};

struct TrainArgs {
  Problem problem;
  const void *x, *residual;  // residual may be nullptr
  void* y;
  uint8_t* mask;  // nullptr unless the backward will want it
  PerChannel weight, bias, running_mean, running_var;
  int64_t* num_batches_tracked;  // may be nullptr
  double *mean, *invstd;         // out, (channels); invstd is 1 / sqrt(biased variance + eps)
  double eps, momentum;          // momentum is the weight of the new batch
  bool cumulative;               // momentum is replaced by 1 / num_batches_tracked, which counts this batch too
  Epilogue epilogue;
};

// Batch norm with statistics that are given. The ops eval, frozen and apply compute it.
struct ApplyArgs {
  Problem problem;
  const void *x, *residual;
  void* y;
  uint8_t* mask;
  PerChannel weight, bias, running_mean, running_var;
  double *mean, *invstd;  // out, or nullptr if no backward follows
  double eps;
  Epilogue epilogue;
};

struct BackwardArgs {
  Problem problem;
  const void *grad_y, *x, *residual;
  const uint8_t* mask;
  PerChannel weight, bias;
  const double *mean, *invstd;
  bool training;  // the statistics came from x, so that gradients flow through them
  // If x is only a part of the batch: the sums of g and of g * xhat over the whole batch, and its values per channel.
  // The gradients of the parameters are absent then. Otherwise these three are absent.
  PerChannel sum_grad, sum_grad_xhat;
  const double* batch_count;
  void *grad_x, *grad_residual;
  PerChannel grad_weight, grad_bias;
  Epilogue epilogue;
};

}  // namespace bnfused
