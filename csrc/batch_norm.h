// The bridge between the ops and the backends: plain types that every compiler may include. <cstdint> only.
//
// A dense tensor (N, C, *) is `outer` x `channels` x `inner` values in memory order, whatever its strides are called:
// NCHW is (N, C, H*W), channels_last and (N, C) are (rows, C, 1), a tensor with C outermost is (1, C, rest).
#pragma once
#include <cstdint>

namespace bnfused {

enum class DType : int32_t { kFloat16, kBFloat16, kFloat32, kFloat64 };

// Codes as in bnfused/activations.py.
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

// kPlanes: a channel is a number of planes of `inner` consecutive values. kRows: channels are innermost, and a row has
// one value of each.
enum class Layout : int32_t { kPlanes, kRows };

struct Problem {
  int64_t outer, channels, inner;
  DType dtype;

  constexpr int64_t values_per_channel() const { return outer * inner; }
  constexpr int64_t numel() const { return outer * channels * inner; }
};

// Bytes of the ReLU mask, which has a bit for each value: with channels innermost all of the tensor is one run of bits,
// otherwise there are whole bytes for every plane. Which bit is whose is each backend's own. bnfused/fake.py has the
// same rule.
constexpr int64_t mask_bytes(const Problem& p) {
  return p.inner == 1 ? (p.numel() + 7) / 8 : p.outer * p.channels * ((p.inner + 7) / 8);
}

// One value per channel, in whatever dtype its owner keeps it; data == nullptr means that there is none.
struct PerChannel {
  void* data = nullptr;
  DType dtype = DType::kFloat32;

  explicit constexpr operator bool() const { return data != nullptr; }
};

struct Epilogue {
  Activation activation;
  double param;  // negative_slope of leaky_relu, alpha of elu
};

// The moments of a part of a batch as they travel between processes. Of a float64 batch they are float64. Of others
// they are float32, and two values add up to a mean, and two to the count: each to 48 bits. It is the standard
// deviation that travels, sqrt(m2 / count), since float32 holds it wherever it holds x: m2 leaves its range where x
// passes 1e19, and nothing is left of it under 1e-22.
struct PackedMoments {
  PerChannel mean, mean_rest, deviation;  // (channels), one behind the other; rests are only there in float32
  PerChannel count, count_rest;           // one value, behind them

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

// What rounding to float32 leaves of a value; of what becomes infinity nothing, or the sum of both would be NaN.
constexpr double rest_of(double value) {
  const double rest = value - double(float(value));
  return rest - rest == 0 ? rest : 0;
}

struct MomentsArgs {
  Problem problem;
  const void* x;
  PackedMoments moments;  // out
};

// Moments of the parts of a batch, merged into those of the whole. A part of no values may hold anything.
struct GatherArgs {
  int64_t parts, channels;
  PackedMoments moments;  // of the first part; those of the next lie `stride` values further on
  int64_t stride;
  PackedMoments merged;                  // out, or none
  PerChannel running_mean, running_var;  // left alone by fewer than two values in all
  int64_t* num_batches_tracked;          // nullptr if nobody counts
  double* batch_mean;                    // out, (channels)
  double* batch_var;                     // out, (channels): biased
  double* batch_count;                   // out, one
  double momentum;
  bool cumulative;  // as in TrainArgs
};

struct TrainArgs {
  Problem problem;
  const void *x, *residual;  // residual: nullptr if there is none
  void* y;
  uint8_t* mask;  // nullptr unless the backward will want it
  PerChannel weight, bias, running_mean, running_var;
  int64_t* num_batches_tracked;  // nullptr if nobody counts
  double* mean;                  // out, (channels)
  double* invstd;                // out, (channels): 1 / sqrt(biased variance + eps)
  double eps;
  double momentum;  // weight of the new batch
  bool cumulative;  // momentum is 1 / num_batches_tracked, counted with this batch
  Epilogue epilogue;
};

// Batch norm with statistics that are given: what eval, frozen and apply compute.
struct ApplyArgs {
  Problem problem;
  const void *x, *residual;
  void* y;
  uint8_t* mask;
  PerChannel weight, bias, running_mean, running_var;
  double* mean;    // out, or nullptr where no backward follows
  double* invstd;  // out, or nullptr likewise
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
  // Sums of g and of g * xhat over the whole batch, where x is only a part of it, and how many values of a channel that
  // has; then the gradients of the parameters are not asked for. Or none.
  PerChannel sum_grad, sum_grad_xhat;
  const double* batch_count;
  void *grad_x, *grad_residual;
  PerChannel grad_weight, grad_bias;
  Epilogue epilogue;
};

}  // namespace bnfused
