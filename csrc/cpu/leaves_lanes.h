// What all loops are made of: the walk over a run in vectors, the lanes at its end, coefficients, and rounding.
// Included like vec.h, after it.

// Calls body(i, full) for every whole vector of [0, n) and body(i, lanes) for the values that are left over.
template <class A, class Body>
BNFUSED_INLINE void for_each_vector(int64_t n, Body body) {
  constexpr int W = Vec<A>::kSize;
  int64_t i = 0;
  for (; i + W <= n; i += W) body(i, std::integral_constant<int, W>{});
  if (i < n) body(i, static_cast<int>(n - i));
}

// The same where computing a value twice does no harm: the values that are left over become a whole vector that ends at
// n. That excludes streaming, which wants alignment, and masks, because their bits start on bytes.
template <class A, bool kMayOverlap, class Body>
BNFUSED_INLINE void map_vectors(int64_t n, Body body) {
  constexpr int W = Vec<A>::kSize;
  if (!kMayOverlap || n < W) {
    for_each_vector<A>(n, body);
    return;
  }
  constexpr std::integral_constant<int, W> full{};
  int64_t i = 0;
  for (; i + W <= n; i += W) body(i, full);
  if (i < n) body(n - W, full);
}

// A vector at p: all of it, or its first lanes. `lanes` is a constant in the first case, so that it costs nothing.
template <class T>
BNFUSED_INLINE Vec<Accumulate<T>> load_lanes(const T* p, std::integral_constant<int, kLanes<Accumulate<T>>>,
                                             Vec<Accumulate<T>>) {
  return load(p);
}
template <class T>
BNFUSED_INLINE Vec<Accumulate<T>> load_lanes(const T* p, int lanes, Vec<Accumulate<T>> fill) {
  return load_first(p, lanes, fill);
}

template <bool kStream, class T, class Round>
BNFUSED_INLINE void store_lanes(T* p, Vec<Accumulate<T>> a, int64_t ahead, Round& round,
                                std::integral_constant<int, kLanes<Accumulate<T>>>) {
  if constexpr (kStream) {
    stream(p, a, round);
  } else {
    if (ahead) __builtin_prefetch(reinterpret_cast<const char*>(p) + ahead, 1, 2);
    store(p, a, round);
  }
}
template <bool kStream, class T, class Round>
BNFUSED_INLINE void store_lanes(T* p, Vec<Accumulate<T>> a, int64_t, Round& round, int lanes) {
  store_first(p, a, lanes, round);
}

template <class A>
BNFUSED_INLINE void store_bits_lanes(uint8_t* p, uint32_t bits, std::integral_constant<int, kLanes<A>>) {
  store_bits<A>(p, bits);
}
template <class A>
BNFUSED_INLINE void store_bits_lanes(uint8_t* p, uint32_t bits, int lanes) {
  store_bits_first<A>(p, bits, lanes);
}
template <class A>
BNFUSED_INLINE uint32_t load_bits_lanes(const uint8_t* p, std::integral_constant<int, kLanes<A>>) {
  return load_bits<A>(p);
}
template <class A>
BNFUSED_INLINE uint32_t load_bits_lanes(const uint8_t* p, int lanes) {
  return load_bits_first<A>(p, lanes);
}

// ---- coefficients: one set for all columns, or one set for each

template <class A, int kCount>
struct Broadcast {
  Vec<A> values[kCount];
  BNFUSED_INLINE Broadcast(const A* coefficients, int64_t stride) {
    for (int k = 0; k < kCount; ++k) values[k] = Vec<A>(coefficients[k * stride]);
  }
  BNFUSED_INLINE const Broadcast& at(int64_t) const { return *this; }
  BNFUSED_INLINE Vec<A> operator[](int k) const { return values[k]; }
};

// at(column) says where to load from. The compiler loads the coefficients that are used, once for the rows that share
// their loads.
template <class A, int kCount>
struct PerColumn {
  const A* coefficients;
  int64_t stride;
  BNFUSED_INLINE PerColumn(const A* c, int64_t s) : coefficients(c), stride(s) {}
  BNFUSED_INLINE PerColumn at(int64_t column) const { return {coefficients + column, stride}; }
  BNFUSED_INLINE Vec<A> operator[](int k) const { return load(coefficients + k * stride); }
};

template <Layout kLayout, class A, int kCount>
using Coefficients = std::conditional_t<kLayout == Layout::kPlanes, Broadcast<A, kCount>, PerColumn<A, kCount>>;

// Rows that share the loads of their coefficients. Streamed rows go one by one: memory delivers one stream of lines of
// each tensor, in order, faster than four.
template <Layout kLayout, bool kStream>
constexpr int kRowsAtOnce = kLayout == Layout::kPlanes || kStream ? 1 : 4;

// Calls f(run, count) for all runs, kMost at a time and then one by one. `count` is a compile-time constant.
template <int kMost, class F>
BNFUSED_INLINE void for_each_few(int64_t runs, F f) {
  int64_t run = 0;
  for (; run + kMost <= runs; run += kMost) f(run, std::integral_constant<int, kMost>{});
  if constexpr (kMost > 1) {
    for (; run < runs; ++run) f(run, std::integral_constant<int, 1>{});
  }
}

// Calls write(round), and once more if the hasty rounding of the first call was wrong. Activations are rounded exactly
// at once: they take far longer than rounding, and because their tails are full of subnormal numbers, hasty rounding
// would often compute them twice.
template <class T, bool kMayBeHasty, class Write>
BNFUSED_INLINE void rounding(Write write) {
  if constexpr (kMayBeHasty && !Hasty<T>::kAlwaysRight) {
    Hasty<T> round;
    write(round);
    if (!round.was_wrong()) return;
  }
  Exact round;
  write(round);
}
