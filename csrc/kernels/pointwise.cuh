// What happens to a value, forward and backward: normalize, scale and shift, add, activate. Each activation is a type
// that has its value and its derivative side by side. They equal those of torch.nn.functional, also at ties. A gradient
// is selected, and never multiplied by zero, so that an infinite grad_y does not leak through a closed ReLU.
#pragma once
#include "batch_norm.h"
#include "kernels/pack.cuh"

namespace bnfused {

// Element c of a per-channel tensor of any dtype, or `missing` if there is no such tensor.
__device__ __forceinline__ double read(const PerChannel& t, int64_t c, double missing) {
  if (t.data == nullptr) return missing;
  switch (t.dtype) {
    case DType::kFloat16:
      return to_accumulate(static_cast<const __half*>(t.data)[c]);
    case DType::kBFloat16:
      return to_accumulate(static_cast<const __nv_bfloat16*>(t.data)[c]);
    case DType::kFloat32:
      return static_cast<const float*>(t.data)[c];
    default:
      return static_cast<const double*>(t.data)[c];
  }
}

__device__ __forceinline__ void write(const PerChannel& t, int64_t c, double value) {
  if (t.data == nullptr) return;
  switch (t.dtype) {
    case DType::kFloat16:
      static_cast<__half*>(t.data)[c] = from_accumulate<__half>(float(value));
      break;
    case DType::kBFloat16:
      static_cast<__nv_bfloat16*>(t.data)[c] = from_accumulate<__nv_bfloat16>(float(value));
      break;
    case DType::kFloat32:
      static_cast<float*>(t.data)[c] = float(value);
      break;
    default:
      static_cast<double*>(t.data)[c] = value;
  }
}

// Write the packed moments of one channel, and the count that all channels share. cpu/moments.h does the same.
__device__ __forceinline__ void pack(const PackedMoments& to, int64_t c, double mean, double m2, double count) {
  write(to.mean, c, mean);
  write(to.mean_rest, c, rest_of(mean));
  write(to.deviation, c, count > 0 ? sqrt(m2 / count) : 0.0);
}
__device__ __forceinline__ void pack_count(const PackedMoments& to, double count) {
  write(to.count, 0, count);
  write(to.count_rest, 0, rest_of(count));
}

// The transform of one channel. The mean is two values of A: one float32 loses x - mean once mean / std exceeds 1e4.
template <class A>
struct Affine {
  A mean, mean_rest, scale, bias;

  Affine() = default;
  __device__ __forceinline__ Affine(double mean_, double invstd, double weight, double bias_)
      : mean(A(mean_)), mean_rest(A(mean_ - double(A(mean_)))), scale(A(weight * invstd)), bias(A(bias_)) {
    if (!(mean_rest == mean_rest)) mean_rest = 0;  // it was infinity - infinity, or NaN; the mean carries that
  }

  __device__ __forceinline__ A centered(A x) const { return (x - mean) - mean_rest; }
  __device__ __forceinline__ A operator()(A x) const { return fma(centered(x), scale, bias); }
};

// An activation works on the 8 values of a unit. `activate` replaces z by the value at z. `differentiate` multiplies g
// by the derivative at z. Values outside the span are computed too. source.cuh explains kLoads and kUnrolled.
struct Identity {
  static constexpr bool kNeedsZ = false;
  static constexpr bool kMasked = false;
  template <class T>
  static constexpr int kLoads = kLoadsAtOnce<T>;
  static constexpr bool kUnrolled = true;

  explicit Identity(const Epilogue&) {}

  template <class T>
  __device__ __forceinline__ void activate(Accumulate<T> (&)[kUnit]) const {}
  template <class T>
  __device__ __forceinline__ void differentiate(Accumulate<T> (&)[kUnit], const Accumulate<T> (&)[kUnit]) const {}
};

struct ReLU {
  static constexpr bool kNeedsZ = true;
  static constexpr bool kMasked = false;
  template <class T>
  static constexpr int kLoads = kLoadsAtOnce<T>;
  static constexpr bool kUnrolled = true;

  explicit ReLU(const Epilogue&) {}

  template <class T>
  __device__ __forceinline__ void activate(Accumulate<T> (&z)[kUnit]) const {
#pragma unroll
    for (int k = 0; k < kUnit; ++k) z[k] = z[k] <= 0 ? Accumulate<T>(0) : z[k];  // NaN stays
  }
  // The gradient flows exactly where the stored y is positive. A positive z may round to a y of zero.
  template <class T>
  __device__ __forceinline__ void differentiate(Accumulate<T> (&g)[kUnit], const Accumulate<T> (&z)[kUnit]) const {
#pragma unroll
    for (int k = 0; k < kUnit; ++k) g[k] = to_accumulate(from_accumulate<T>(z[k])) <= 0 ? Accumulate<T>(0) : g[k];
  }
};

// The backward of ReLU after a residual was added. It reads one bit for each value, and neither the residual nor z.
struct MaskedReLU {
  static constexpr bool kNeedsZ = false;
  static constexpr bool kMasked = true;
  template <class T>
  static constexpr int kLoads = kLoadsAtOnce<T>;
  static constexpr bool kUnrolled = true;

  explicit MaskedReLU(const Epilogue&) {}
};

template <class A>
__device__ __forceinline__ A sigmoid(A z) {
  return quotient(A(1), A(1) + exp(-z));
}
// The cumulative distribution function of the standard normal distribution.
__device__ __forceinline__ float normal_cdf(float z) { return 0.5f * (1 + erf(z * 0.70710678118654752440f)); }
// Not inlined: eight of them side by side would take more registers than a thread has.
static __device__ __attribute__((noinline)) double normal_cdf(double z) {
  return 0.5 * (1 + erf(z * 0.70710678118654752440));
}
template <class A>
__device__ __forceinline__ A clamp(A z, A low, A high) {
  return z < low ? low : (z > high ? high : z);  // NaN stays
}

template <class A, class F>
__device__ __forceinline__ void for_each_value(A (&values)[kUnit], F f) {
#pragma unroll
  for (int k = 0; k < kUnit; ++k) values[k] = f(values[k]);
}
template <class A, class F>
__device__ __forceinline__ void for_each_value(A (&values)[kUnit], const A (&at)[kUnit], F f) {
#pragma unroll
  for (int k = 0; k < kUnit; ++k) values[k] = f(values[k], at[k]);
}

// The activations that are not worth a kernel of their own. A thread chooses one at run time, once for each unit. The
// loop over units is not unrolled, because each copy of this code has 2,000 instructions.
struct AnyActivation {
  static constexpr bool kNeedsZ = true;
  static constexpr bool kMasked = false;
  template <class T>
  static constexpr int kLoads = kLoadsAtOnce<T>;
  static constexpr bool kUnrolled = false;

  Activation activation;
  double param;

  explicit AnyActivation(const Epilogue& epilogue) : activation(epilogue.activation), param(epilogue.param) {}

  template <class T>
  __device__ __forceinline__ void activate(Accumulate<T> (&values)[kUnit]) const {
    using A = Accumulate<T>;
    const A parameter = A(param);
    switch (activation) {
      case Activation::kIdentity:
      case Activation::kReLU:  // these two have kernels of their own
        break;
      case Activation::kReLU6:
        return for_each_value(values, [](A z) { return clamp(z, A(0), A(6)); });
      case Activation::kLeakyReLU:
        return for_each_value(values, [=](A z) { return z > 0 ? z : z * parameter; });
      case Activation::kELU:
        return for_each_value(values, [=](A z) { return z > 0 ? z : parameter * expm1(z); });
      case Activation::kSiLU:
        return for_each_value(values, [](A z) { return quotient(z, A(1) + exp(-z)); });
      case Activation::kGELU:
        return for_each_value(values, [](A z) { return z * normal_cdf(z); });
      case Activation::kHardswish:
        return for_each_value(values, [](A z) { return z * clamp(z + A(3), A(0), A(6)) * A(1.0 / 6); });
      case Activation::kSigmoid:
        return for_each_value(values, [](A z) { return sigmoid(z); });
      case Activation::kTanh:
        return for_each_value(values, [](A z) { return tanh(z); });
    }
  }

  template <class T>
  __device__ __forceinline__ void differentiate(Accumulate<T> (&gradients)[kUnit],
                                                const Accumulate<T> (&at)[kUnit]) const {
    using A = Accumulate<T>;
    const A parameter = A(param);
    switch (activation) {
      case Activation::kIdentity:
      case Activation::kReLU:
        break;
      case Activation::kReLU6:
        return for_each_value(gradients, at, [](A g, A z) { return z <= 0 || z >= 6 ? A(0) : g; });
      case Activation::kLeakyReLU:
        return for_each_value(gradients, at, [=](A g, A z) { return z > 0 ? g : g * parameter; });
      case Activation::kELU:
        return for_each_value(gradients, at, [=](A g, A z) { return z > 0 ? g : g * parameter * exp(z); });
      case Activation::kSiLU:
        return for_each_value(gradients, at, [](A g, A z) {
          const A e = exp(-z), s = quotient(A(1), A(1) + e);
          // If s is close to 1, then 1 - s is mostly the rounding error of s, and z would multiply that error.
          return g * s * fma(z, z > 0 ? e * s : A(1) - s, A(1));
        });
      case Activation::kGELU:
        return for_each_value(gradients, at, [](A g, A z) {
          const A density = exp(z * z * A(-0.5)) * A(0.39894228040143267794);
          return g * fma(z, density, normal_cdf(z));
        });
      case Activation::kHardswish:
        // The order matters: NaN must take the last branch, which keeps it.
        return for_each_value(gradients, at,
                              [](A g, A z) { return z <= -3 ? A(0) : (z >= 3 ? g : g * fma(z, A(1.0 / 3), A(0.5))); });
      case Activation::kSigmoid:
        return for_each_value(gradients, at, [](A g, A z) {
          const A s = sigmoid(z);
          return g * s * (A(1) - s);
        });
      case Activation::kTanh:
        return for_each_value(gradients, at, [](A g, A z) {
          const A t = tanh(z);
          return g * (A(1) - t * t);
        });
    }
  }
};

}  // namespace bnfused
