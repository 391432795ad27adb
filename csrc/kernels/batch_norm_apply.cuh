// The forward once the statistics are known: y = act((x - mean) * invstd * weight + bias + residual).
//
//   computes  y, and the ReLU mask if a backward will need it; in eval mode also invstd, from the running variance
//   moves     reads x (and the residual) once; writes y once, and one bit of the mask for each value
//   blocks    Rows: a tile of columns x a part of the rows. Planes: a run of units
//   needs     mean and invstd of the batch, or running statistics
#pragma once
#include "kernels/on_chip.cuh"
#include "kernels/pointwise.cuh"
#include "kernels/sweep.cuh"

namespace bnfused {

// Where the constants of the forward come from: the statistics of this batch, or the running statistics.
struct ForwardConstants {
  PerChannel weight, bias;
  const double *mean, *invstd;  // of the batch; nullptr if the running statistics are used
  PerChannel running_mean, running_var;
  double *saved_mean, *saved_invstd;  // out, from the running statistics; or nullptr
  double eps;

  template <class A>
  __device__ __forceinline__ Affine<A> get(uint32_t c, bool owns) const {
    double m, s;
    if (mean != nullptr) {
      m = mean[c];
      s = invstd[c];
    } else {
      m = read(running_mean, c, 0);
      s = 1 / sqrt(read(running_var, c, 1) + eps);
      if (owns && saved_mean != nullptr) {
        saved_mean[c] = m;
        saved_invstd[c] = s;
      }
    }
    return Affine<A>(m, s, read(weight, c, 1), read(bias, c, 0));
  }
};

template <class T, class Act>
struct ForwardBody {
  using Value = T;
  using A = Accumulate<T>;
  using Constants = Affine<A>;
  static constexpr int kLoads = Act::template kLoads<T>;
  static constexpr bool kUnrolled = Act::kUnrolled;
  struct Loaded {
    Pack<T> x, residual;
  };

  const T *x, *residual;  // residual may be nullptr
  T* y;
  uint8_t* mask;  // bit k of byte u belongs to value k of unit u; may be nullptr
  bool wide;
  Act activation;

  __device__ __forceinline__ void load(Loaded& loaded, uint32_t unit, Span span) const {
    load_unit(loaded.x, x + int64_t(unit) * kUnit, span, wide);
    load_residual(loaded, unit, span);
  }

  __device__ __forceinline__ void fetch(const OnChip<T>& kept, uint32_t step, uint32_t unit) const {
    kept.fetch(step, 0, x + int64_t(unit) * kUnit);
  }

  // x was kept. Only this pass reads the residual.
  __device__ __forceinline__ void recall(Loaded& loaded, const OnChip<T>& kept, uint32_t step, uint32_t unit,
                                         Span span) const {
    kept.get(step, 0, loaded.x);
    load_residual(loaded, unit, span);
  }

  __device__ __forceinline__ void load_residual(Loaded& loaded, uint32_t unit, Span span) const {
    if (residual != nullptr) load_unit(loaded.residual, residual + int64_t(unit) * kUnit, span, wide);
  }

  template <class ConstantsOf>
  __device__ __forceinline__ void store(const Loaded& loaded, uint32_t unit, Span span,
                                        ConstantsOf constants_of) const {
    A z[kUnit];
#pragma unroll
    for (int k = 0; k < kUnit; ++k) {
      z[k] = constants_of(k)(value_of(loaded.x, k));
      if (residual != nullptr) z[k] += value_of(loaded.residual, k);
    }
    activation.template activate<T>(z);
    const Pack<T> rounded = pack_of<T>(z);
    store_unit(y + int64_t(unit) * kUnit, rounded, span, wide);
    if (mask == nullptr) return;
    unsigned bits = 0;
#pragma unroll
    for (int k = 0; k < kUnit; ++k) bits |= unsigned(span.has(k) && !(value_of(rounded, k) <= 0)) << k;
    store_global(mask + unit, uint8_t(bits));
  }
};

template <class T, class Act>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerSm<T>)
    batch_norm_apply_rows(ForwardBody<T, Act> body, ForwardConstants constants, int64_t numel, Rows s) {
  sweep_rows(body, numel, s, [&](uint32_t c, bool owns) { return constants.get<Accumulate<T>>(c, owns); });
}

template <class T, class Act>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerSm<T>)
    batch_norm_apply_planes(ForwardBody<T, Act> body, ForwardConstants constants, int64_t numel, Flat s) {
  sweep_flat(body, numel, s, [&](uint32_t c, bool owns) { return constants.get<Accumulate<T>>(c, owns); });
}

}  // namespace bnfused
