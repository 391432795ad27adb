// One vector of values, for the instruction set that the including file (leaves_*.cpp) has switched on. It is included
// inside a namespace of that file's own, so that no two instruction sets share a symbol, and it includes nothing
// itself. The including file defines BNFUSED_AVX512, with BNFUSED_AVX512_BF16 or without, or BNFUSED_AVX2 (with FMA and
// F16C): the compiler's own macros do not follow `#pragma GCC target`.
//
// Arithmetic uses the vector extension of GCC and clang. Intrinsics are there only for operations that the extension
// lacks: fused multiply-add, masked and streaming access, half precision.

#define BNFUSED_INLINE inline __attribute__((always_inline))
#define BNFUSED_INLINE_LAMBDA __attribute__((always_inline))

template <class A>
constexpr int kLanes = 8;
#if defined(BNFUSED_AVX512)
template <>
inline constexpr int kLanes<float> = 16;
#endif

template <class A>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float Native __attribute__((vector_size(4 * kLanes<float>)));
  typedef int32_t Bits __attribute__((vector_size(4 * kLanes<float>)));
};
template <>
struct Lanes<double> {
  typedef double Native __attribute__((vector_size(64)));
  typedef int64_t Bits __attribute__((vector_size(64)));
};

template <class A>
struct Vec {
  using Native = typename Lanes<A>::Native;
  using Bits = typename Lanes<A>::Bits;  // the result of a comparison: all ones where it is true
  static constexpr int kSize = kLanes<A>;
  Native v;

  Vec() = default;
  // The implicit copy is slow: gcc 12 copies a trivial aggregate in pieces of 16 bytes, through memory, and the wide
  // reload after that stalls (measured: the AVX2 leaves up to 10 times slower).
  BNFUSED_INLINE Vec(const Vec& other) : v(other.v) {}
  BNFUSED_INLINE Vec& operator=(const Vec& other) {
    v = other.v;
    return *this;
  }
  BNFUSED_INLINE Vec(Native n) : v(n) {}
  BNFUSED_INLINE Vec(A a) : v(Native{} + a) {}
};

template <class A>
BNFUSED_INLINE Vec<A> operator+(Vec<A> a, Vec<A> b) {
  return a.v + b.v;
}
template <class A>
BNFUSED_INLINE Vec<A> operator-(Vec<A> a, Vec<A> b) {
  return a.v - b.v;
}
template <class A>
BNFUSED_INLINE Vec<A> operator*(Vec<A> a, Vec<A> b) {
  return a.v * b.v;
}
template <class A>
BNFUSED_INLINE Vec<A> operator/(Vec<A> a, Vec<A> b) {
  return a.v / b.v;
}
template <class A>
BNFUSED_INLINE auto operator>(Vec<A> a, Vec<A> b) {
  return a.v > b.v;
}
template <class A>
BNFUSED_INLINE auto operator<=(Vec<A> a, Vec<A> b) {
  return a.v <= b.v;
}
template <class A>
BNFUSED_INLINE Vec<A> select(typename Vec<A>::Bits where, Vec<A> yes, Vec<A> no) {
  return where ? yes.v : no.v;
}
// NaN in `a` stays NaN, because the instruction returns its second operand then. Compilers do not find this instruction
// in a select.
template <class A>
BNFUSED_INLINE Vec<A> at_least(Vec<A> a, A low) {
#if defined(BNFUSED_AVX512)
  if constexpr (std::is_same_v<A, float>) {
    return Vec<A>(_mm512_max_ps(Vec<A>(low).v, a.v));
  } else {
    return Vec<A>(_mm512_max_pd(Vec<A>(low).v, a.v));
  }
#elif defined(BNFUSED_AVX2)
  if constexpr (std::is_same_v<A, float>) return Vec<A>(_mm256_max_ps(Vec<A>(low).v, a.v));
#endif
  return select<A>(Vec<A>(low) > a, Vec<A>(low), a);
}
template <class A>
BNFUSED_INLINE Vec<A> at_most(Vec<A> a, A high) {
  return select<A>(a > Vec<A>(high), Vec<A>(high), a);
}
template <class A>
BNFUSED_INLINE Vec<A> magnitude(Vec<A> a) {
  return select<A>(a > Vec<A>(A(0)), a, Vec<A>(A(0)) - a);
}

// a * b + c. Where the instruction set has no fused multiply-add, the compiler may or may not fuse. It does the same in
// forward and backward.
template <class A>
BNFUSED_INLINE Vec<A> fma(Vec<A> a, Vec<A> b, Vec<A> c) {
#if defined(BNFUSED_AVX512)
  if constexpr (std::is_same_v<A, float>) {
    return Vec<A>(_mm512_fmadd_ps(a.v, b.v, c.v));
  } else {
    return Vec<A>(_mm512_fmadd_pd(a.v, b.v, c.v));
  }
#elif defined(BNFUSED_AVX2)
  if constexpr (std::is_same_v<A, float>) return Vec<A>(_mm256_fmadd_ps(a.v, b.v, c.v));
#endif
  return a.v * b.v + c.v;
}

// The lanes of a Vec<A> in float64.
template <class A>
struct Wide {
  static constexpr int kParts = kLanes<A> / 8;
  Vec<double> parts[kParts];

  BNFUSED_INLINE Wide() {
    for (int i = 0; i < kParts; ++i) parts[i] = Vec<double>(0.0);
  }
#if defined(BNFUSED_AVX512)
  BNFUSED_INLINE explicit Wide(Vec<A> a) {
    if constexpr (std::is_same_v<A, double>) {
      parts[0] = a;
    } else {
      parts[0] = Vec<double>(_mm512_cvtps_pd(_mm512_castps512_ps256(a.v)));
      parts[1] = Vec<double>(_mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1)));
    }
  }
#else
  BNFUSED_INLINE explicit Wide(Vec<A> a) {
    if constexpr (std::is_same_v<A, double>) {
      parts[0] = a;
    } else {
      parts[0] = Vec<double>(__builtin_convertvector(a.v, typename Vec<double>::Native));
    }
  }
#endif
  BNFUSED_INLINE void operator+=(const Wide& other) {
    for (int i = 0; i < kParts; ++i) parts[i] = parts[i] + other.parts[i];
  }
  BNFUSED_INLINE double sum() const {
    Vec<double> all = parts[0];
    for (int i = 1; i < kParts; ++i) all = all + parts[i];
    const auto& v = all.v;  // pairwise: eight additions in a row would take most of the time of a 7 x 7 plane
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
  }
};

template <class A>
BNFUSED_INLINE typename Vec<A>::Bits first_lanes(int n) {
  typename Vec<A>::Bits lane;
  for (int i = 0; i < Vec<A>::kSize; ++i) lane[i] = i;
  return lane < n;
}

// ---- access: storage type <-> vector of its arithmetic type

template <class T, class Word>
BNFUSED_INLINE Word read_as(const T* p) {
  Word w;
  __builtin_memcpy(&w, p, sizeof(Word));
  return w;
}
template <class T, class Word>
BNFUSED_INLINE void write_as(T* p, Word w) {
  __builtin_memcpy(p, &w, sizeof(Word));
}

typedef uint16_t Half16 __attribute__((vector_size(2 * kLanes<float>)));
typedef uint32_t Word32 __attribute__((vector_size(4 * kLanes<float>)));

#if defined(BNFUSED_AVX512)
// One shuffle, where converting and shifting would be two instructions, and in `narrow` four. The versions below say
// plainly what these compute.
BNFUSED_INLINE Vec<float> widen(BFloat16, Half16 bits) {
  const __m512i to_high = _mm512_slli_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), 16);
  return Vec<float>(
      (__m512)_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, to_high, _mm512_castsi256_si512((__m256i)bits)));
}
BNFUSED_INLINE Half16 narrow(BFloat16, Vec<float> a) {
  const __m512i u = (__m512i)a.v;
  __m512i rounded = _mm512_add_epi32(u, _mm512_set1_epi32(0x7fff));
  rounded = _mm512_mask_add_epi32(rounded, _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000)), u,
                                  _mm512_set1_epi32(0x8000));
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
  const __m512i high = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 31, 29, 27, 25, 23, 21, 19, 17,
                                        15, 13, 11, 9, 7, 5, 3, 1);
  return (Half16)_mm512_castsi512_si256(_mm512_permutexvar_epi16(high, rounded));
}
#else
BNFUSED_INLINE Vec<float> widen(BFloat16, Half16 bits) {
  return Vec<float>(typename Vec<float>::Native(__builtin_convertvector(bits, Word32) << 16));
}
BNFUSED_INLINE Half16 narrow(BFloat16, Vec<float> a) {
  const Word32 u = Word32(a.v);
  const Word32 rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;  // to nearest, ties to even
  const Word32 nan = Word32{} + 0x7fc0;
  return __builtin_convertvector(a.v == a.v ? rounded : nan, Half16);
}
#endif
#if defined(BNFUSED_AVX512)
BNFUSED_INLINE Vec<float> widen(Float16, Half16 bits) { return Vec<float>(_mm512_cvtph_ps((__m256i)bits)); }
BNFUSED_INLINE Half16 narrow(Float16, Vec<float> a) {
  return (Half16)_mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(BNFUSED_AVX2)
BNFUSED_INLINE Vec<float> widen(Float16, Half16 bits) { return Vec<float>(_mm256_cvtph_ps((__m128i)bits)); }
BNFUSED_INLINE Half16 narrow(Float16, Vec<float> a) {
  return (Half16)_mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
// These are calls: inlined, the bit arithmetic of eight lanes would triple the size of the baseline.
__attribute__((noinline)) Vec<float> widen(Float16, Half16 bits) {
  Vec<float> a;
  for (int i = 0; i < kLanes<float>; ++i) a.v[i] = c10::detail::fp16_ieee_to_fp32_value(bits[i]);
  return a;
}
__attribute__((noinline)) Half16 narrow(Float16, Vec<float> a) {
  Half16 bits;
  for (int i = 0; i < kLanes<float>; ++i) bits[i] = c10::detail::fp16_ieee_from_fp32_value(a.v[i]);
  return bits;
}
#endif

// Rounds float32 to 16 bits: to nearest, ties to even.
struct Exact {
  static constexpr bool kAlwaysRight = true;

  template <class T>
  BNFUSED_INLINE Half16 operator()(T type, Vec<float> a) {
    return narrow(type, a);
  }
};
template <class T>
struct Hasty : Exact {};
#if defined(BNFUSED_AVX512_BF16)
// One instruction where Exact takes six (eval of 12 MB, channels_last: 20 values a ns instead of 15). But it takes
// subnormal numbers for zero. One check at the end, whether there was a subnormal number, costs less than a check at
// each store.
template <>
struct Hasty<BFloat16> {
  static constexpr bool kAlwaysRight = false;
  __m512 subnormal = {};  // the last one of each lane; a mask would not stay in its register

  BNFUSED_INLINE Half16 operator()(BFloat16, Vec<float> a) {
    constexpr int kSubnormal = 0x20;
    subnormal = _mm512_mask_mov_ps(subnormal, _mm512_fpclass_ps_mask(a.v, kSubnormal), a.v);
    return (Half16)(__m256i)_mm512_cvtneps_pbh(a.v);
  }
  BNFUSED_INLINE bool was_wrong() const {
    const __m512i bits = (__m512i)subnormal;
    return _mm512_test_epi32_mask(bits, bits) != 0;
  }
};
#endif

template <class T>
constexpr bool kIsHalf = std::is_same_v<T, Float16> || std::is_same_v<T, BFloat16>;

template <class T>
BNFUSED_INLINE Vec<Accumulate<T>> load(const T* p) {
  if constexpr (kIsHalf<T>) {
    return widen(T{}, read_as<T, Half16>(p));
  } else {
    return Vec<T>(read_as<T, typename Vec<T>::Native>(p));
  }
}

template <class T, class Round>
BNFUSED_INLINE void store(T* p, Vec<Accumulate<T>> a, Round& round) {
  if constexpr (kIsHalf<T>) {
    write_as(p, round(T{}, a));
  } else {
    write_as(p, a.v);
  }
}
template <class T>
BNFUSED_INLINE void store(T* p, Vec<Accumulate<T>> a) {
  Exact round;
  store(p, a, round);
}

// Keeps a load separate from a select that uses it. gcc folds `mask ? load : 0` into a masked load, which cannot start
// before the mask is known. Where the mask comes from another load, two streams from memory then wait for one another
// (measured: the sums of a gated gradient at 24 instead of 60 GB/s).
template <class A>
BNFUSED_INLINE Vec<A> unfolded(Vec<A> a) {
#if defined(BNFUSED_AVX512)
  asm("" : "+v"(a.v));
#endif
  return a;
}

// The first n lanes from memory, the others from `fill`.
template <class T>
BNFUSED_INLINE Vec<Accumulate<T>> load_first(const T* p, int n, Vec<Accumulate<T>> fill) {
  using A = Accumulate<T>;
#if defined(BNFUSED_AVX512)
  if constexpr (kIsHalf<T>) {
    const auto wide = widen(T{}, (Half16)_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p));
    return Vec<A>(_mm512_mask_mov_ps(fill.v, __mmask16((1u << n) - 1), wide.v));
  } else if constexpr (std::is_same_v<T, float>) {
    return Vec<A>(_mm512_mask_loadu_ps(fill.v, __mmask16((1u << n) - 1), p));
  } else {
    return Vec<A>(_mm512_mask_loadu_pd(fill.v, __mmask8((1u << n) - 1), p));
  }
#else
#if defined(BNFUSED_AVX2)
  if constexpr (std::is_same_v<T, float>) {
    const auto first = first_lanes<A>(n);
    return select<A>(first, Vec<A>(_mm256_maskload_ps(p, (__m256i)first)), fill);
  }
#endif
  T buffer[kLanes<A>] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return select<A>(first_lanes<A>(n), load(buffer), fill);
#endif
}

template <class T, class Round>
BNFUSED_INLINE void store_first(T* p, Vec<Accumulate<T>> a, int n, Round& round) {
#if defined(BNFUSED_AVX512)
  if constexpr (kIsHalf<T>) {
    _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), (__m256i)round(T{}, a));
  } else if constexpr (std::is_same_v<T, float>) {
    _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), a.v);
  } else {
    _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), a.v);
  }
#else
  T buffer[kLanes<Accumulate<T>>];
  store(buffer, a, round);
  for (int i = 0; i < n; ++i) p[i] = buffer[i];
#endif
}

template <class A>
BNFUSED_INLINE Wide<A> load_wide(const double* p) {
  Wide<A> w;
  for (int i = 0; i < Wide<A>::kParts; ++i) w.parts[i] = load(p + 8 * i);
  return w;
}
template <class A>
BNFUSED_INLINE void store_wide(double* p, const Wide<A>& w) {
  for (int i = 0; i < Wide<A>::kParts; ++i) store(p + 8 * i, w.parts[i]);
}

// Stores past the caches. p is aligned to the bytes of a.
template <class T, class Round>
BNFUSED_INLINE void stream(T* p, Vec<Accumulate<T>> a, Round& round) {
#if defined(BNFUSED_AVX512)
  if constexpr (kIsHalf<T>) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)round(T{}, a));
  } else {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)a.v);
  }
#elif defined(BNFUSED_AVX2)
  if constexpr (kIsHalf<T>) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)round(T{}, a));
  } else if constexpr (std::is_same_v<T, float>) {
    _mm256_stream_ps(p, a.v);
  } else {
    store(p, a, round);
  }
#else
  store(p, a, round);
#endif
}

// ---- one bit for each lane; the first lane has the lowest bit

// A bit is set where a lane is above the limit, or NaN.
template <class A>
BNFUSED_INLINE uint32_t bits_above(Vec<A> a, A limit) {
#if defined(BNFUSED_AVX512)
  if constexpr (std::is_same_v<A, float>) {
    return _mm512_cmp_ps_mask(a.v, Vec<A>(limit).v, _CMP_NLE_UQ);
  } else {
    return _mm512_cmp_pd_mask(a.v, Vec<A>(limit).v, _CMP_NLE_UQ);
  }
#else
  const auto where = ~(a <= Vec<A>(limit));
#if defined(BNFUSED_AVX2)
  if constexpr (std::is_same_v<A, float>) return _mm256_movemask_ps((__m256)where);
#endif
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<A>; ++i) bits |= uint32_t(where[i] & 1) << i;
  return bits;
#endif
}

template <class A>
BNFUSED_INLINE Vec<A> select_bits(uint32_t bits, Vec<A> yes, Vec<A> no) {
#if defined(BNFUSED_AVX512)
  if constexpr (std::is_same_v<A, float>) {
    return Vec<A>(_mm512_mask_blend_ps(static_cast<__mmask16>(bits), no.v, yes.v));
  } else {
    return Vec<A>(_mm512_mask_blend_pd(static_cast<__mmask8>(bits), no.v, yes.v));
  }
#else
  typename Vec<A>::Bits bit;
  for (int i = 0; i < kLanes<A>; ++i) bit[i] = 1 << i;
  return select<A>((bit & int(bits)) == bit, yes, no);
#endif
}

template <class A>
BNFUSED_INLINE void store_bits(uint8_t* p, uint32_t bits) {
  p[0] = static_cast<uint8_t>(bits);
  if constexpr (kLanes<A> > 8) p[1] = static_cast<uint8_t>(bits >> 8);
}
// Stores the bytes that n lanes need, where n is at most a vector. The bits of other lanes are 0.
template <class A>
BNFUSED_INLINE void store_bits_first(uint8_t* p, uint32_t bits, int n) {
  bits &= (1u << n) - 1;
  p[0] = static_cast<uint8_t>(bits);
  if (n > 8) p[1] = static_cast<uint8_t>(bits >> 8);
}

template <class A>
BNFUSED_INLINE uint32_t load_bits(const uint8_t* p) {
  if constexpr (kLanes<A> > 8) return read_as<uint8_t, uint16_t>(p);
  return p[0];
}
template <class A>
BNFUSED_INLINE uint32_t load_bits_first(const uint8_t* p, int n) {
  return p[0] | (n > 8 ? uint32_t(p[1]) << 8 : 0);
}
