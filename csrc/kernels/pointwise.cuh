// What happens to one value, forward and backward: normalize, scale and shift, add, activate. Each activation is a type
// with its value and its gradient side by side; values and gradients, ties included, are those of torch.nn.functional.
// `gradient` selects and never multiplies by zero, so that an infinite grad_y does not leak through a closed ReLU.
#pragma once
#include "batch_norm.h"
#include "kernels/pack.cuh"

namespace bnfused {

// Element c of a per-channel tensor, whatever its dtype; `missing` where there is none.
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

// One channel's transform. The mean is a pair of floats: float32 alone loses the difference once mean / std passes 1e4.
template <class A>
struct Affine {
  A mean, mean_rest, scale, bias;

  Affine() = default;
  __device__ __forceinline__ Affine(double mean_, double invstd, double weight, double bias_)
      : mean(A(mean_)), mean_rest(A(mean_ - double(A(mean_)))), scale(A(weight * invstd)), bias(A(bias_)) {
    if (!(mean_rest == mean_rest)) mean_rest = 0;  // infinity - infinity; the mean itself carries it
  }

  __device__ __forceinline__ A centered(A x) const { return (x - mean) - mean_rest; }
  __device__ __forceinline__ A operator()(A x) const { return fma(centered(x), scale, bias); }
};

template <class A>
__device__ __forceinline__ A relu(A z) {
  return z <= 0 ? A(0) : z;  // NaN stays
}

struct Identity {
  static constexpr bool kNeedsZ = false;
  static constexpr bool kMasked = false;

  explicit Identity(const Epilogue&) {}

  template <class T>
  __device__ __forceinline__ Accumulate<T> value(Accumulate<T> z) const {
    return z;
  }
  template <class T>
  __device__ __forceinline__ Accumulate<T> gradient(Accumulate<T> g, Accumulate<T>) const {
    return g;
  }
};

struct ReLU {
  static constexpr bool kNeedsZ = true;
  static constexpr bool kMasked = false;

  explicit ReLU(const Epilogue&) {}

  template <class T>
  __device__ __forceinline__ Accumulate<T> value(Accumulate<T> z) const {
    return relu(z);
  }
  // Flows exactly where the stored y is positive: a positive z may round to zero.
  template <class T>
  __device__ __forceinline__ Accumulate<T> gradient(Accumulate<T> g, Accumulate<T> z) const {
    return to_accumulate(from_accumulate<T>(z)) <= 0 ? Accumulate<T>(0) : g;
  }
};

// ReLU where a residual was added: the backward reads one bit for each value, and neither the residual nor z.
struct MaskedReLU {
  static constexpr bool kNeedsZ = false;
  static constexpr bool kMasked = true;

  explicit MaskedReLU(const Epilogue&) {}
};

template <class A>
__device__ __forceinline__ A sigmoid(A z) {
  return quotient(A(1), A(1) + exp(-z));
}
// The share of a standard normal below z.
template <class A>
__device__ __forceinline__ A normal_cdf(A z) {
  return A(0.5) * (A(1) + erf(z * A(0.70710678118654752440)));
}
template <class A>
__device__ __forceinline__ A clamp(A z, A low, A high) {
  return z < low ? low : (z > high ? high : z);  // NaN stays
}

// The activations that are not worth a kernel of their own: chosen while running.
struct AnyActivation {
  static constexpr bool kNeedsZ = true;
  static constexpr bool kMasked = false;

  Activation activation;
  double param;

  explicit AnyActivation(const Epilogue& epilogue) : activation(epilogue.activation), param(epilogue.param) {}

  template <class T>
  __device__ __forceinline__ Accumulate<T> value(Accumulate<T> z) const {
    using A = Accumulate<T>;
    switch (activation) {
      case Activation::kIdentity:
        return z;
      case Activation::kReLU:
        return relu(z);
      case Activation::kReLU6:
        return clamp(z, A(0), A(6));
      case Activation::kLeakyReLU:
        return z > 0 ? z : z * A(param);
      case Activation::kELU:
        return z > 0 ? z : A(param) * expm1(z);
      case Activation::kSiLU:
        return quotient(z, A(1) + exp(-z));
      case Activation::kGELU:
        return z * normal_cdf(z);
      case Activation::kHardswish:
        return z * clamp(z + A(3), A(0), A(6)) * A(1.0 / 6);
      case Activation::kSigmoid:
        return sigmoid(z);
      case Activation::kTanh:
        return tanh(z);
    }
    return z;
  }

  template <class T>
  __device__ __forceinline__ Accumulate<T> gradient(Accumulate<T> g, Accumulate<T> z) const {
    using A = Accumulate<T>;
    switch (activation) {
      case Activation::kIdentity:
        return g;
      case Activation::kReLU:
        return z <= 0 ? A(0) : g;
      case Activation::kReLU6:
        return z <= 0 || z >= 6 ? A(0) : g;
      case Activation::kLeakyReLU:
        return z > 0 ? g : g * A(param);
      case Activation::kELU:
        return z > 0 ? g : g * A(param) * exp(z);
      case Activation::kSiLU: {
        const A s = sigmoid(z);
        return g * s * fma(z, A(1) - s, A(1));
      }
      case Activation::kGELU: {
        const A pdf = exp(z * z * A(-0.5)) * A(0.39894228040143267794);
        return g * fma(z, pdf, normal_cdf(z));
      }
      case Activation::kHardswish:
        return z >= 3 ? g : (z > -3 ? g * fma(z, A(1.0 / 3), A(0.5)) : A(0));
      case Activation::kSigmoid: {
        const A s = sigmoid(z);
        return g * s * (A(1) - s);
      }
      case Activation::kTanh: {
        const A t = tanh(z);
        return g * (A(1) - t * t);
      }
    }
    return g;
  }
};

}  // namespace bnfused
