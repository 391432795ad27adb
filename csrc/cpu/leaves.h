// The leaf functions of the CPU backend: loops over raw pointers, one set for each instruction set, chosen at run time.
//
// They know nothing of threads, of torch or of what a statistic means. The drivers (batch_norm_*.cpp) cut a tensor into
// runs: contiguous values, `stride` apart. In the planes layout (NCHW) a run is one channel's plane and has one set of
// coefficients; in the rows layout (channels innermost) a run is a row, or a few rows end to end, and every column has
// its own.
#pragma once
#include <cstdint>
#include <limits>
#include <type_traits>

#include "batch_norm.h"

namespace bnfused::cpu {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Arithmetic is in float32, in float64 for float64.
template <class T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

struct Runs {
  int64_t count, length;
  int64_t stride;       // values from one run to the next; negative walks backwards
  int64_t mask_stride;  // bytes likewise
};

// What the loop over a run does beside the affine map, resolved at compile time: kMaskedReLU meets a residual, and the
// forward writes the mask that the backward reads. kOther asks the Epilogue at run time: those activations cost far
// more than the question.
enum class ForwardKind { kIdentity, kReLU, kMaskedReLU, kOther };
enum class BackwardKind { kIdentity, kReLU, kMaskedReLU, kOther };
constexpr int kForwards = 4;
constexpr int kBackwards = 4;

// Where a pass over rows that only sums them finds them.
enum class Source { kCache, kMemory };

// Widest vector of any instruction set, in values: coefficient arrays of the rows layout are padded by as much.
constexpr int64_t kMaxLanes = 16;
// Of a cache: what streaming stores want every run to start on, and what no vector should straddle.
constexpr int64_t kLineBytes = 64;

// y = act((x - mean) * scale + shift + residual). Coefficient k is coefficients[k * stride + column] in the rows layout
// and coefficients[k * stride + run * step] in the planes layout, where step 0 gives all runs the same.
enum ForwardCoefficient { kMean, kScale, kShift, kForwardCoefficients };

template <class T>
struct ApplyLoop {
  const T *x, *residual;  // residual may be nullptr
  T* y;
  uint8_t* mask;
  Runs runs;
  const Accumulate<T>* coefficients;
  int64_t coefficient_stride, coefficient_step;
  int64_t prefetch;     // values ahead of x and residual to fetch into L2 while storing; 0 for none
  int64_t store_ahead;  // bytes ahead of a store to ask for its line; 0 for not
  Epilogue epilogue;
};

// With g = grad_y * act'(z):  grad_x = g * scale + (x - mean) * slope + offset,  grad_residual = g. Only training has
// slope and offset; 0 would not do in their place, for an infinite or NaN x.
enum BackwardCoefficient { kSlope = kForwardCoefficients, kOffset, kBackwardCoefficients };

template <class T>
struct GradLoop {
  const T *grad_y, *x, *residual;
  const uint8_t* mask;
  T *grad_x, *grad_residual;  // either may be nullptr
  Runs runs;
  const Accumulate<T>* coefficients;
  int64_t coefficient_stride;
  int64_t prefetch, store_ahead;
  bool training;
  Epilogue epilogue;
};

struct Sums {
  double first, second;
};

template <class T>
struct Leaves {
  using A = Accumulate<T>;
  // Sum of (x - shift) and of its square. All sums leave a lane for float64 after a few values: what a lane of A holds
  // is never more than a few roundings old.
  Sums (*plane_moments)(const T* x, Runs, A shift);
  // [source]: the same for every column; sums and squares are overwritten.
  void (*row_moments[2])(const T* x, Runs, const A* shift, double* sums, double* squares);
  // Whether `trusted` (moments.h) holds for every column.
  bool (*all_trusted)(const double* sums, const double* squares, double count, int64_t columns);
  // Merges a block's sums, around its shift, into the mean and sum of squared deviations of `before` earlier values.
  void (*merge_columns)(const A* shift, const double* sums, const double* squares, double count, double before,
                        double* mean, double* m2, int64_t columns);
  // Sums of columns added up to those of channels, each of `inner` columns side by side.
  void (*fold)(const double* sums, const double* products, int64_t channels, int64_t inner, Sums* of_channel);
  // The other way: each channel's value, one every `step`, to its columns. Writes up to a vector more.
  void (*spread)(const A* of_channel, int64_t step, int64_t channels, int64_t inner, A* of_column);
  // Sum of g and of g * (x - mean).
  Sums (*plane_grad_sums[kBackwards])(const GradLoop<T>&);
  // [source][kind]
  void (*row_grad_sums[2][kBackwards])(const GradLoop<T>&, double* sums, double* products);
  // [layout][streaming][kind]
  void (*apply[2][2][kForwards])(const ApplyLoop<T>&);
  void (*grad_apply[2][2][kBackwards])(const GradLoop<T>&);
};

// How far, in standard deviations of a block, its mean may lie from the shift that it was summed around; and the range
// that sums of squares must lie in for their squares to have kept their digits.
constexpr double kTrusted = 2;
template <class A>
constexpr double kLowestSquares = double(std::numeric_limits<A>::min()) * 1e8;
template <class A>
constexpr double kHighestSquares = double(std::numeric_limits<A>::max()) * 1e-1;

// Each instruction set's own table; leaves_avx*.cpp are empty where the compiler cannot build them.
namespace baseline {
template <class T>
const Leaves<T>* leaves();
}
namespace avx2 {
template <class T>
const Leaves<T>* leaves();
}
namespace avx512 {
template <class T>
const Leaves<T>* leaves();
}
namespace avx512_bf16 {
template <class T>
const Leaves<T>* leaves();  // of BFloat16 alone
}

// `#pragma GCC target` and the intrinsics under it: gcc on x86-64. Other compilers get the baseline.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define BNFUSED_X86_DISPATCH 1
#endif

enum class Capability { kBaseline, kAvx2, kAvx512, kAvx512Bf16 };

// The best instruction set that this machine has and this build knows; ATEN_CPU_CAPABILITY lowers it, as torch's own.
Capability capability();
const char* capability_name();

template <class T>
const Leaves<T>* leaves_of(Capability capability) {
#if defined(BNFUSED_X86_DISPATCH)
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (capability == Capability::kAvx512Bf16) return avx512_bf16::leaves<T>();
  }
  if (capability >= Capability::kAvx512) return avx512::leaves<T>();
  if (capability == Capability::kAvx2) return avx2::leaves<T>();
#endif
  return baseline::leaves<T>();
}

template <class T>
const Leaves<T>& best_leaves() {
  static const Leaves<T>* const table = leaves_of<T>(capability());
  return *table;
}

}  // namespace bnfused::cpu
