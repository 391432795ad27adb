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

struct Problem {
  int64_t outer, channels, inner;
  DType dtype;

  constexpr int64_t rows() const { return outer * inner; }  // values per channel
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

  explicit operator bool() const { return data != nullptr; }
};

struct Epilogue {
  Activation activation;
  double param;  // negative_slope of leaky_relu, alpha of elu
};

struct MomentsArgs {
  Problem problem;
  const void* x;
  double* mean;  // out, (channels)
  double* m2;    // out, (channels): sum of squared deviations from the mean
};

// Moments of the parts of a batch, merged into those of the whole. A part of no values may hold anything.
struct GatherArgs {
  int64_t parts, channels;
  const double *mean, *m2;  // (parts, channels), a part every mean_stride and m2_stride values
  const double* count;      // (parts), every count_stride values
  int64_t mean_stride, m2_stride, count_stride;
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

struct EvalArgs {
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
  // Means of g and of g * xhat over the whole batch, (channels), where x is only a part of it, and then the gradients
  // of the parameters are not asked for; or nullptr.
  const double *mean_grad, *mean_grad_xhat;
  void *grad_x, *grad_residual;
  PerChannel grad_weight, grad_bias;
  Epilogue epilogue;
};

}  // namespace bnfused
