// The leaf functions of the CPU backend: loops over raw pointers, one set for each instruction set, chosen at run time.
//
// They know nothing of threads, of torch or of the meaning of a statistic. The drivers (batch_norm_*.cpp) cut a tensor
// into runs: contiguous values, `stride` apart. In the planes layout (NCHW) a run is one channel's plane and has one
// set of coefficients. In the rows layout (channels innermost) a run is a row, or a few rows end to end, and every
// column has its own coefficients.
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

// Arithmetic is in float32; for float64 it is in float64.
template <class T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

struct Runs {
  int64_t count, length;
  int64_t stride;       // values from one run to the next; negative walks backwards
  int64_t mask_stride;  // the same in bytes of the mask
};

// What the loop over a run computes after the affine map, resolved at compile time. kMaskedReLU is ReLU after a
// residual: the forward writes the mask, and the backward reads it. kOther looks at the Epilogue at run time: those
// activations cost far more than that.
enum class ForwardKind { kIdentity, kReLU, kMaskedReLU, kOther };
enum class BackwardKind { kIdentity, kReLU, kMaskedReLU, kOther };
constexpr int kForwardKinds = 4;
constexpr int kBackwardKinds = 4;

// Where a pass that only sums rows finds them.
enum class Source { kCache, kMemory };

// y = act((x - mean) * scale + shift + residual). Coefficient k is coefficients[k * stride + column] in the rows layout
// and coefficients[k * stride + run * step] in the planes layout. With step 0 all runs have the same coefficients.
enum ForwardCoefficient { kMean, kScale, kShift, kForwardCoefficients };

template <class T>
struct ApplyLoop {
  const T *x, *residual;  // residual may be nullptr
  T* y;
  uint8_t* mask;
  Runs runs;
  const Accumulate<T>* coefficients;
  int64_t coefficient_stride, coefficient_step;
  int64_t prefetch;     // values ahead of the store that x and residual are fetched into L2; 0 for not at all
  int64_t store_ahead;  // see store_ahead() below
  Epilogue epilogue;
};

// With g = grad_y * act'(z):  grad_x = g * scale + (x - mean) * slope + offset,  grad_residual = g. Only training has
// slope and offset. Zeros would not be equivalent: 0 * inf and 0 * NaN are NaN.
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

// The loops of one instruction set, for one dtype.
template <class T>
struct Leaves {
  using A = Accumulate<T>;
  using RowMoments = void (*)(const T* x, Runs, const A* shift, double* sums, double* squares);
  using PlaneGradSums = Sums (*)(const GradLoop<T>&);
  using RowGradSums = void (*)(const GradLoop<T>&, double* sums, double* products);
  using Apply = void (*)(const ApplyLoop<T>&);
  using GradApply = void (*)(const GradLoop<T>&);

  // Sum of (x - shift) and of its square. All sums move from a lane of A to float64 after a few values, so that a lane
  // is never more than a few roundings old.
  Sums (*plane_moments)(const T* x, Runs, A shift);
  // Whether `trusted` (moments.h) holds for every column.
  bool (*all_trusted)(const double* sums, const double* squares, double count, int64_t columns);
  // Merges a block's sums, around its shift, into the mean and sum of squared deviations of `before` earlier values.
  void (*merge_columns)(const A* shift, const double* sums, const double* squares, double count, double before,
                        double* mean, double* m2, int64_t columns);
  // Adds the sums of columns up to sums of channels, each of which has `inner` neighbouring columns.
  void (*fold)(const double* sums, const double* products, int64_t channels, int64_t inner, Sums* of_channel);
  // The reverse: copies each channel's value, one every `step`, to its columns. Writes up to a vector more.
  void (*spread)(const A* of_channel, int64_t step, int64_t channels, int64_t inner, A* of_column);

  // As plane_moments, for every column; sums and squares are overwritten.
  constexpr RowMoments& row_moments(Source source) { return row_moments_[int(source)]; }
  constexpr RowMoments row_moments(Source source) const { return row_moments_[int(source)]; }
  // Sum of g and of g * (x - mean).
  constexpr PlaneGradSums& plane_grad_sums(BackwardKind kind) { return plane_grad_sums_[int(kind)]; }
  constexpr PlaneGradSums plane_grad_sums(BackwardKind kind) const { return plane_grad_sums_[int(kind)]; }
  // The same for every column.
  constexpr RowGradSums& row_grad_sums(Source source, BackwardKind kind) {
    return row_grad_sums_[int(source)][int(kind)];
  }
  constexpr RowGradSums row_grad_sums(Source source, BackwardKind kind) const {
    return row_grad_sums_[int(source)][int(kind)];
  }
  // y, and the mask.
  constexpr Apply& apply(Layout layout, bool streamed, ForwardKind kind) {
    return apply_[int(layout)][streamed][int(kind)];
  }
  constexpr Apply apply(Layout layout, bool streamed, ForwardKind kind) const {
    return apply_[int(layout)][streamed][int(kind)];
  }
  // grad_x and grad_residual.
  constexpr GradApply& grad_apply(Layout layout, bool streamed, BackwardKind kind) {
    return grad_apply_[int(layout)][streamed][int(kind)];
  }
  constexpr GradApply grad_apply(Layout layout, bool streamed, BackwardKind kind) const {
    return grad_apply_[int(layout)][streamed][int(kind)];
  }

  // Read and set through the accessors above.
  RowMoments row_moments_[2];
  PlaneGradSums plane_grad_sums_[kBackwardKinds];
  RowGradSums row_grad_sums_[2][kBackwardKinds];
  Apply apply_[2][2][kForwardKinds];
  GradApply grad_apply_[2][2][kBackwardKinds];
};

// How far, in standard deviations of a block, its mean may lie from the shift that the block was summed around.
constexpr double kTrusted = 2;
// The range in which sums of squares have kept their digits.
template <class A>
constexpr double kLowestSquares = double(std::numeric_limits<A>::min()) * 1e8;
template <class A>
constexpr double kHighestSquares = double(std::numeric_limits<A>::max()) * 1e-1;

// The table of each instruction set. leaves_avx*.cpp are empty where the compiler cannot build them.
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
const Leaves<T>* leaves();  // only for BFloat16
}

// gcc and clang on x86-64 can compile a part of a file for another instruction set. Other compilers get the baseline.
#if defined(__x86_64__) && defined(__GNUC__)
#define BNFUSED_X86_DISPATCH 1
#endif

enum class Capability { kBaseline, kAvx2, kAvx512, kAvx512Bf16 };

// The best instruction set that this machine has and this build knows. ATEN_CPU_CAPABILITY lowers it, as it lowers that
// of torch.
Capability capability();
const char* capability_name();

// How many bytes ahead of a store its line is asked for in exclusive state, or 0 for not at all. A core that waits for
// the line with each store gains by asking early (Sapphire Rapids: 10 becomes 16 to 22 GB/s). A core that asks early on
// its own has nothing to gain (Zen 5: within 6 % either way).
int64_t store_ahead();

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
