// The activations: the value and the gradient of each, on one vector. Included like vec.h, after it.
//
// Values and gradients, ties included, are those of torch.nn.functional. `gradient` gates with a select and never
// multiplies by zero, so that an infinite grad_y does not leak through a closed ReLU. `value` and `gradient` are calls,
// not inlined: many loops reach them, and their arithmetic costs more than the call.

// The largest z that rounds to zero in T. ReLU's gradient flows exactly where the stored y is positive.
template <class T>
constexpr Accumulate<T> kRoundsToZero = 0;
template <>
inline constexpr float kRoundsToZero<Float16> = 0x1p-25f;
template <>
inline constexpr float kRoundsToZero<BFloat16> = 0x1p-134f;

template <class A>
BNFUSED_INLINE Vec<A> relu(Vec<A> z) {
  return at_least(z, A(0));
}

// ---- exp, expm1, erf: polynomials for float, libm lane by lane for double

// x = n ln 2 + r with |r| <= ln 2 / 2. Returns expm1(r) by its Taylor series; the next term would be below 6e-9.
BNFUSED_INLINE Vec<float> reduced_expm1(Vec<float> x, typename Vec<float>::Bits* n) {
  using V = Vec<float>;
  const V kRound(12582912.0f);  // 1.5 * 2^23: adding it leaves no fraction bits
  const V whole = fma(x, V(1.44269504f), kRound) - kRound;
  *n = __builtin_convertvector(whole.v, typename V::Bits);
  const V r = fma(whole, V(1.42860677e-6f), fma(whole, V(-0.693148613f), x));  // ln 2 in two parts
  V p(1.98412698e-4f);
  p = fma(p, r, V(1.38888889e-3f));
  p = fma(p, r, V(8.33333333e-3f));
  p = fma(p, r, V(4.16666667e-2f));
  p = fma(p, r, V(1.66666667e-1f));
  p = fma(p, r, V(0.5f));
  return fma(p * r, r, r);
}

BNFUSED_INLINE Vec<float> power_of_two(typename Vec<float>::Bits n) {
  return Vec<float>(typename Vec<float>::Native((n + 127) << 23));
}

BNFUSED_INLINE Vec<float> exp(Vec<float> x) {
  typename Vec<float>::Bits n;
  const Vec<float> p = reduced_expm1(at_most(at_least(x, -120.0f), 120.0f), &n);
  const auto half = n >> 1;  // in two steps: 2^n alone would leave float's range before exp(x) does
  return (p + Vec<float>(1.0f)) * power_of_two(half) * power_of_two(n - half);
}

// For x <= 0.
BNFUSED_INLINE Vec<float> expm1(Vec<float> x) {
  typename Vec<float>::Bits n;
  const Vec<float> p = reduced_expm1(at_least(x, -40.0f), &n);  // -1 to the last bit from -17 on
  const Vec<float> scale = power_of_two(n);
  return fma(p, scale, scale - Vec<float>(1.0f));
}

// Minimax polynomials fitted for this file: erf(t) / t in t^2 below 1 (error 1.2e-9), -log(1 - erf(t)) in t up to 4.1
// (error 1.3e-9 in erf), beyond which erf is 1 in float.
BNFUSED_INLINE Vec<float> erf(Vec<float> x) {
  using V = Vec<float>;
  const V t = magnitude(x);
  const V s = t * t;
  V small(7.889122828e-5f);
  small = fma(small, s, V(-8.020842266e-4f));
  small = fma(small, s, V(5.189535450e-3f));
  small = fma(small, s, V(-2.685444465e-2f));
  small = fma(small, s, V(1.128360018e-1f));
  small = fma(small, s, V(-3.761262714e-1f));
  small = fma(small, s, V(1.128379166f)) * x;
  const V u = at_most(t, 4.1f);
  V large(-1.915041402e-4f);
  large = fma(large, u, V(2.999540729e-3f));
  large = fma(large, u, V(-2.205199752e-2f));
  large = fma(large, u, V(1.035668922e-1f));
  large = fma(large, u, V(6.376000386e-1f));
  large = fma(large, u, V(1.127426086f));
  large = fma(large, u, V(2.564456538e-4f));
  const V tail = V(1.0f) - exp(V(0.0f) - large);
  return select<float>(t > V(1.0f), select<float>(x > V(0.0f), tail, V(0.0f) - tail), small);
}

template <class F>
BNFUSED_INLINE Vec<double> lane_by_lane(Vec<double> x, F f) {
  for (int i = 0; i < Vec<double>::kSize; ++i) x.v[i] = f(x.v[i]);
  return x;
}
BNFUSED_INLINE Vec<double> exp(Vec<double> x) {
  return lane_by_lane(x, [](double a) { return __builtin_exp(a); });
}
BNFUSED_INLINE Vec<double> expm1(Vec<double> x) {
  return lane_by_lane(x, [](double a) { return __builtin_expm1(a); });
}
BNFUSED_INLINE Vec<double> erf(Vec<double> x) {
  return lane_by_lane(x, [](double a) { return __builtin_erf(a); });
}

template <class A>
BNFUSED_INLINE Vec<A> sigmoid(Vec<A> z) {
  return Vec<A>(A(1)) / (Vec<A>(A(1)) + exp(Vec<A>(A(0)) - z));
}
template <class A>
BNFUSED_INLINE Vec<A> tanh(Vec<A> z) {
  const Vec<A> e = expm1(magnitude(z) * Vec<A>(A(-2)));
  const Vec<A> t = e / (e + Vec<A>(A(2)));
  return select<A>(z > Vec<A>(A(0)), Vec<A>(A(0)) - t, t);
}
// The share of a standard normal below z.
template <class A>
BNFUSED_INLINE Vec<A> normal_cdf(Vec<A> z) {
  return Vec<A>(A(0.5)) * (Vec<A>(A(1)) + erf(z * Vec<A>(A(0.70710678118654752440))));
}

template <class A>
__attribute__((noinline)) Vec<A> value(const Epilogue& epilogue, Vec<A> z) {
  using V = Vec<A>;
  const V zero(A(0));
  const V param(static_cast<A>(epilogue.param));
  switch (epilogue.activation) {
    case Activation::kIdentity:
      return z;
    case Activation::kReLU:
      return relu(z);
    case Activation::kReLU6:
      return at_most(relu(z), A(6));
    case Activation::kLeakyReLU:
      return select<A>(z > zero, z, z * param);
    case Activation::kELU:
      return select<A>(z > zero, z, param * expm1(select<A>(z > zero, zero, z)));
    case Activation::kSiLU:
      return z / (V(A(1)) + exp(zero - z));
    case Activation::kGELU:
      return z * normal_cdf(z);
    case Activation::kHardswish:
      return z * at_most(at_least(z + V(A(3)), A(0)), A(6)) * V(A(1) / A(6));
    case Activation::kSigmoid:
      return sigmoid(z);
    case Activation::kTanh:
      return tanh(z);
  }
  return z;
}

// g * act'(z).
template <class A>
__attribute__((noinline)) Vec<A> gradient(const Epilogue& epilogue, Vec<A> g, Vec<A> z) {
  using V = Vec<A>;
  const V zero(A(0)), one(A(1));
  const V param(static_cast<A>(epilogue.param));
  switch (epilogue.activation) {
    case Activation::kIdentity:
      return g;
    case Activation::kReLU:
      return select<A>(z <= zero, zero, g);
    case Activation::kReLU6:
      return select<A>(z > zero, select<A>(V(A(6)) > z, g, zero), zero);
    case Activation::kLeakyReLU:
      return select<A>(z > zero, g, g * param);
    case Activation::kELU:
      return select<A>(z > zero, g, g * param * exp(select<A>(z > zero, zero, z)));
    case Activation::kSiLU: {
      const V s = sigmoid(z);
      return g * s * fma(z, one - s, one);
    }
    case Activation::kGELU: {
      const V pdf = exp(z * z * V(A(-0.5))) * V(A(0.39894228040143267794));
      return g * fma(z, pdf, normal_cdf(z));
    }
    case Activation::kHardswish:
      // In this order NaN takes the branch that keeps it.
      return select<A>(z <= V(A(-3)), zero, select<A>(V(A(3)) <= z, g, g * fma(z, V(A(1) / A(3)), V(A(0.5)))));
    case Activation::kSigmoid: {
      const V s = sigmoid(z);
      return g * s * (one - s);
    }
    case Activation::kTanh: {
      const V t = tanh(z);
      return g * (one - t * t);
    }
  }
  return g;
}
