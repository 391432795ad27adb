// The loops themselves. Included once for each instruction set, inside a namespace of its own, after vec.h and
// epilogue.h; ends in kLeaves<T>, the table that leaves.h declares.

// Calls body(i, full) for every whole vector of [0, n) and body(i, lanes) for what is left over.
template <class A, class Body>
BNFUSED_INLINE void for_each_vector(int64_t n, Body body) {
  constexpr int W = Vec<A>::kSize;
  int64_t i = 0;
  for (; i + W <= n; i += W) body(i, std::integral_constant<int, W>{});
  if (i < n) body(i, static_cast<int>(n - i));
}

// The same where doing a value twice does no harm: what is left over becomes a whole vector that ends at n. Not for
// streaming, which wants alignment, nor for masks, whose bits start on bytes.
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

// ---- coefficients: one set for all columns, or one for each

template <class A, int kCount>
struct Broadcast {
  Vec<A> values[kCount];
  BNFUSED_INLINE Broadcast(const A* coefficients, int64_t stride) {
    for (int k = 0; k < kCount; ++k) values[k] = Vec<A>(coefficients[k * stride]);
  }
  BNFUSED_INLINE const Broadcast& at(int64_t) const { return *this; }
  BNFUSED_INLINE Vec<A> operator[](int k) const { return values[k]; }
};

// at(column) says where to load from; the compiler loads what is used, once for all rows that are taken together.
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

// Rows that share the loads of their coefficients. Streaming rows go one by one: memory delivers one stream of lines of
// each tensor, in order, faster than four.
template <Layout kLayout, bool kStream>
constexpr int kTogether = kLayout == Layout::kPlanes || kStream ? 1 : 4;

// Calls f(run, count) for all runs, kMost at a time and then one by one; count is a constant.
template <int kMost, class F>
BNFUSED_INLINE void for_each_group(int64_t runs, F f) {
  int64_t run = 0;
  for (; run + kMost <= runs; run += kMost) f(run, std::integral_constant<int, kMost>{});
  if constexpr (kMost > 1) {
    for (; run < runs; ++run) f(run, std::integral_constant<int, 1>{});
  }
}

// Calls write(round), and again where what it wrote was rounded hastily and wrong. Activations take far longer than
// rounding, and are seldom done twice: their tails are full of subnormal numbers.
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

// ---- forward

template <class T, Layout kLayout, bool kStream, ForwardKind kKind, class Round>
BNFUSED_INLINE void apply_with(const ApplyLoop<T>& args_in, Round& round) {
  using A = Accumulate<T>;
  using V = Vec<A>;
  const ApplyLoop<T> args = args_in;
  for_each_group<kTogether<kLayout, kStream>>(args.runs.count, [&](int64_t run, auto count) BNFUSED_INLINE_LAMBDA {
    const Coefficients<kLayout, A, kForwardCoefficients> coefficients(args.coefficients + run * args.coefficient_step,
                                                                      args.coefficient_stride);
    constexpr bool kMasked = kKind == ForwardKind::kMaskedReLU;
    constexpr bool kMayOverlap = !kStream && !kMasked;
    map_vectors<A, kMayOverlap>(args.runs.length, [&](int64_t i, auto lanes) BNFUSED_INLINE_LAMBDA {
      const auto& c = coefficients.at(i);
      const V mean = c[kMean], scale = c[kScale], shift = c[kShift];
#pragma GCC unroll 4
      for (int r = 0; r < decltype(count)::value; ++r) {
        const int64_t at = (run + r) * args.runs.stride + i;
        if (args.prefetch) {
          __builtin_prefetch(args.x + at + args.prefetch, 0, 2);
          if (kMasked || args.residual) __builtin_prefetch(args.residual + at + args.prefetch, 0, 2);
        }
        V z = fma(load_lanes(args.x + at, lanes, V(A(0))) - mean, scale, shift);
        if (kMasked || args.residual) z = z + load_lanes(args.residual + at, lanes, V(A(0)));
        if constexpr (kMasked) {
          uint8_t* bits = args.mask + (run + r) * args.runs.mask_stride + i / 8;
          store_bits_lanes<A>(bits, bits_above(z, kRoundsToZero<T>), lanes);
        }
        if constexpr (kMasked || kKind == ForwardKind::kReLU) z = relu(z);
        if constexpr (kKind == ForwardKind::kOther) z = value(args.epilogue, z);
        store_lanes<kStream>(args.y + at, z, args.store_ahead, round, lanes);
      }
    });
  });
}

template <class T, Layout kLayout, bool kStream, ForwardKind kKind>
void apply(const ApplyLoop<T>& args) {
  rounding<T, kKind != ForwardKind::kOther>(
      [&](auto& round) BNFUSED_INLINE_LAMBDA { apply_with<T, kLayout, kStream, kKind>(args, round); });
}

// ---- sums over all values of a slab, or over the rows of each column

// Two sums of products over one vector: first += u, second += u * v for the term's (u, v).
template <class A>
struct Pair {
  Vec<A> u, v;
};

// Values that a lane adds up in A before its sum moves to float64. With eight, grad_weight was two units in the last
// place off where torch's float64 sums were one.
constexpr int kLaneValues = 4;

template <class A, class Term>
BNFUSED_INLINE Sums sum_all(Runs runs, Term term) {
  using V = Vec<A>;
  constexpr int W = V::kSize;
  constexpr int kChains = 4;  // so that additions do not wait for one another
  V first[kChains], second[kChains];
  Wide<A> all_first, all_second;
  const auto clear = [&]() BNFUSED_INLINE_LAMBDA {
    for (int k = 0; k < kChains; ++k) first[k] = second[k] = V(A(0));
  };
  const auto flush = [&]() BNFUSED_INLINE_LAMBDA {
    all_first += Wide<A>((first[0] + first[1]) + (first[2] + first[3]));
    all_second += Wide<A>((second[0] + second[1]) + (second[2] + second[3]));
    clear();
  };
  const auto add = [&](int k, Pair<A> t) BNFUSED_INLINE_LAMBDA {
    first[k] = first[k] + t.u;
    second[k] = fma(t.u, t.v, second[k]);
  };
  constexpr std::integral_constant<int, W> full{};
  clear();
  int added = 0;  // at most, to any chain
  for (int64_t run = 0; run < runs.count; ++run) {
    int64_t i = 0;
    for (; i + kChains * W <= runs.length; i += kChains * W) {
#pragma GCC unroll 4
      for (int k = 0; k < kChains; ++k) add(k, term(run, i + k * W, full));
      if (++added == kLaneValues) {
        flush();
        added = 0;
      }
    }
    if (i == runs.length) continue;
    if (i + 2 * W <= runs.length) {
      add(0, term(run, i, full));
      add(1, term(run, i + W, full));
      i += 2 * W;
    }
    if (i + W <= runs.length) {
      add(2, term(run, i, full));
      i += W;
    }
    if (i < runs.length) add(3, term(run, i, static_cast<int>(runs.length - i)));
    if (++added == kLaneValues) {
      flush();
      added = 0;
    }
  }
  flush();
  return {all_first.sum(), all_second.sum()};
}

// kVectors columns' worth of vectors at `column`, down all rows.
template <int kVectors, class A, class Term>
BNFUSED_INLINE void sum_tile(int64_t rows, int64_t column, Term term, double* sums, double* products) {
  using V = Vec<A>;
  constexpr int W = V::kSize;
  constexpr std::integral_constant<int, W> full{};
  V first[kVectors], second[kVectors];
  Wide<A> all_first[kVectors], all_second[kVectors];
  for (int64_t row = 0; row < rows;) {
    for (int v = 0; v < kVectors; ++v) first[v] = second[v] = V(A(0));
    for (const int64_t end = row + kLaneValues < rows ? row + kLaneValues : rows; row < end; ++row) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Pair<A> t = term(row, column + v * W, full);
        first[v] = first[v] + t.u;
        second[v] = fma(t.u, t.v, second[v]);
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      all_first[v] += Wide<A>(first[v]);
      all_second[v] += Wide<A>(second[v]);
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    store_wide<A>(sums + column + v * W, all_first[v]);
    store_wide<A>(products + column + v * W, all_second[v]);
  }
}

// Rows of up to four vectors, whose sums stay in registers.
template <class A>
BNFUSED_INLINE bool is_tile(int64_t width) {
  return width <= 4 * Vec<A>::kSize && width % Vec<A>::kSize == 0;
}

// Places that wide rows are summed at, at once. From memory four streams of lines arrive the fastest (25 MB, 1 KiB
// rows: the sums of the backward 1.04 ms from two places of two tensors, 1.34 from eight); from the cache, and where a
// line holds twice the values, more places are less work.
template <class T, Source kSource, int kTensors>
constexpr int kPlaces = kSource == Source::kCache || kIsHalf<T> ? 8 : 4 / kTensors;

// Asks for what lies ahead of p: 16 KiB, shared by the streams. A tile's rows are one stream of each tensor. Nothing
// for what is cached, where a prefetch costs as much as a load.
template <Source kSource, int kTensors, class T>
BNFUSED_INLINE void fetch_ahead(const T* p, int64_t width) {
  constexpr int64_t kBytes = 16384 / kTensors;
  if constexpr (kSource == Source::kMemory) {
    if (is_tile<Accumulate<T>>(width)) {
      __builtin_prefetch(reinterpret_cast<const char*>(p) + kBytes);
    } else if constexpr (!kIsHalf<T>) {
      __builtin_prefetch(reinterpret_cast<const char*>(p) + kBytes / kPlaces<T, kSource, kTensors>);
    }
  }
}

// Wide rows are taken several at a time, left to right, so that the sums of a column are loaded once for several of its
// values; from places far apart, each read in order, since rows that lie side by side confuse the hardware's prefetch.
template <int kMost, class A, class Term>
BNFUSED_INLINE void sum_columns(Runs runs, Term term, double* sums, double* products) {
  using V = Vec<A>;
  constexpr int W = V::kSize;
  const int64_t width = runs.length, rows = runs.count;
  if (is_tile<A>(width)) {
    int64_t column = 0;
    if (width == 4 * W) {
      sum_tile<4, A>(rows, 0, term, sums, products);
      return;
    }
    if (width >= 2 * W) {
      sum_tile<2, A>(rows, 0, term, sums, products);
      column = 2 * W;
    }
    if (column < width) sum_tile<1, A>(rows, column, term, sums, products);
    return;
  }
  const int64_t apart = rows / kMost;
  const auto sweep = [&](int64_t row, auto count) BNFUSED_INLINE_LAMBDA {
    for_each_vector<A>(width, [&](int64_t i, auto lanes) BNFUSED_INLINE_LAMBDA {
      constexpr int kRows = decltype(count)::value;
      constexpr int kChains = kRows > kLaneValues ? 2 : 1;
      V first[2] = {V(A(0)), V(A(0))}, second[2] = {V(A(0)), V(A(0))};
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Pair<A> t = term(row + r * apart, i, lanes);
        first[r % kChains] = first[r % kChains] + t.u;
        second[r % kChains] = fma(t.u, t.v, second[r % kChains]);
      }
      Wide<A> a(first[0] + first[1]), b(second[0] + second[1]);
      if (row > 0) {
        a += load_wide<A>(sums + i);
        b += load_wide<A>(products + i);
      }
      store_wide<A>(sums + i, a);
      store_wide<A>(products + i, b);
    });
  };
  for (int64_t row = 0; row < apart; ++row) sweep(row, std::integral_constant<int, kMost>{});
  for (int64_t row = apart * kMost; row < rows; ++row) sweep(row, std::integral_constant<int, 1>{});
}

template <class T>
Sums plane_moments(const T* x, Runs runs, Accumulate<T> shift) {
  using A = Accumulate<T>;
  const Vec<A> k(shift);
  return sum_all<A>(runs, [=](int64_t run, int64_t i, auto lanes) BNFUSED_INLINE_LAMBDA {
    const Vec<A> d = load_lanes(x + run * runs.stride + i, lanes, k) - k;
    return Pair<A>{d, d};
  });
}

template <class T, Source kSource>
void row_moments(const T* x, Runs runs, const Accumulate<T>* shift, double* sums, double* squares) {
  using A = Accumulate<T>;
  sum_columns<kPlaces<T, kSource, 1>, A>(
      runs,
      [=](int64_t run, int64_t i, auto lanes) BNFUSED_INLINE_LAMBDA {
        const T* at = x + run * runs.stride + i;
        fetch_ahead<kSource, 1>(at, runs.length);
        const Vec<A> k = load(shift + i);
        const Vec<A> d = load_lanes(at, lanes, k) - k;
        return Pair<A>{d, d};
      },
      sums, squares);
}

template <class A>
bool all_trusted(const double* sums, const double* squares, double count, int64_t columns) {
  using V = Vec<double>;
  const V inverse(1 / count), limit(kTrusted * kTrusted), zero(0.0);
  const V low(kLowestSquares<A>), high(kHighestSquares<A>);
  typename V::Bits doubtful = zero > zero;
  for_each_vector<double>(columns, [&](int64_t i, auto lanes) BNFUSED_INLINE_LAMBDA {
    const V s = load_lanes(sums + i, lanes, zero), q = load_lanes(squares + i, lanes, zero);
    const V shared = s * (s * inverse);
    const auto some = (s.v != zero.v) | (q.v != zero.v);
    doubtful |= (shared > limit * (q - shared)) | (q > high) | (some & (low > q));
  });
  int64_t any = 0;
  for (int lane = 0; lane < V::kSize; ++lane) any |= doubtful[lane];
  return any == 0;
}

template <class A>
void merge_columns(const A* shift, const double* sums, const double* squares, double count, double before, double* mean,
                   double* m2, int64_t columns) {
  using V = Vec<double>;
  const double share = count / (before + count);
  const V inverse(1 / count), of_mean(share), of_square(before * share), zero(0.0);
  Exact exact;
  // The arrays are padded for reading; past `columns` a short last row must leave them as they are.
  for_each_vector<double>(columns, [&](int64_t i, auto lanes) BNFUSED_INLINE_LAMBDA {
    V k;
    for (int lane = 0; lane < V::kSize; ++lane) k.v[lane] = shift[i + lane];
    const V s = load(sums + i), m = load(mean + i);
    const V offset = s * inverse;
    const V own = load(squares + i) - s * offset;
    const V delta = (k + offset) - m;
    const V merged = load(m2 + i) + select<double>(own <= zero, zero, own) + delta * (delta * of_square);
    store_lanes<false>(mean + i, m + delta * of_mean, 0, exact, lanes);
    store_lanes<false>(m2 + i, merged, 0, exact, lanes);
  });
}

BNFUSED_INLINE double sum_of(const double* values, int64_t n) {
  using V = Vec<double>;
  const V zero(0.0);
  V all[2] = {zero, zero};
  int64_t i = 0;
  for (; i + 2 * V::kSize <= n; i += 2 * V::kSize) {
    all[0] = all[0] + load(values + i);
    all[1] = all[1] + load(values + i + V::kSize);
  }
  if (i + V::kSize <= n) {
    all[0] = all[0] + load(values + i);
    i += V::kSize;
  }
  if (i < n) all[1] = all[1] + load_first(values + i, static_cast<int>(n - i), zero);
  Wide<double> wide(all[0] + all[1]);
  return wide.sum();
}

inline void fold(const double* sums, const double* products, int64_t channels, int64_t inner, Sums* of_channel) {
  for (int64_t c = 0; c < channels; ++c) {
    of_channel[c] = {sum_of(sums + c * inner, inner), sum_of(products + c * inner, inner)};
  }
}

template <class A>
void spread(const A* of_channel, int64_t step, int64_t channels, int64_t inner, A* of_column) {
  for (int64_t c = 0; c < channels; ++c) {
    const Vec<A> value(of_channel[c * step]);
    for (int64_t i = 0; i < inner; i += Vec<A>::kSize) store(of_column + c * inner + i, value);
  }
}

// ---- backward

// g = grad_y * act'(z) for the vector at (run, i), and d = x - mean, or 0 where neither this nor the caller needs it.
template <class T, BackwardKind kKind, bool kWithD, class C>
BNFUSED_INLINE Pair<Accumulate<T>> gated(const GradLoop<T>& args, const C& c, int64_t run, int64_t i, auto lanes) {
  using A = Accumulate<T>;
  using V = Vec<A>;
  const int64_t at = run * args.runs.stride + i;
  V d(A(0));
  if constexpr (kWithD || kKind == BackwardKind::kReLU || kKind == BackwardKind::kOther) {
    const V mean = c[kMean];
    d = load_lanes(args.x + at, lanes, mean) - mean;
  }
  V g = unfolded(load_lanes(args.grad_y + at, lanes, V(A(0))));
  if constexpr (kKind == BackwardKind::kReLU) {
    const V z = fma(d, c[kScale], c[kShift]);
    g = select<A>(z <= V(kRoundsToZero<T>), V(A(0)), g);
  } else if constexpr (kKind == BackwardKind::kMaskedReLU) {
    const uint8_t* bits = args.mask + run * args.runs.mask_stride + i / 8;
    g = select_bits(load_bits_lanes<A>(bits, lanes), g, V(A(0)));
  } else if constexpr (kKind == BackwardKind::kOther) {
    V z = fma(d, c[kScale], c[kShift]);
    if (args.residual) z = z + load_lanes(args.residual + at, lanes, V(A(0)));
    g = gradient(args.epilogue, g, z);
  }
  return {g, d};
}

template <class T, BackwardKind kKind>
Sums plane_grad_sums(const GradLoop<T>& args_in) {
  using A = Accumulate<T>;
  const GradLoop<T> args = args_in;
  const Broadcast<A, kForwardCoefficients> c(args.coefficients, args.coefficient_stride);
  return sum_all<A>(args.runs, [&](int64_t run, int64_t i, auto lanes)
                                   BNFUSED_INLINE_LAMBDA { return gated<T, kKind, true>(args, c, run, i, lanes); });
}

template <class T, Source kSource, BackwardKind kKind>
void row_grad_sums(const GradLoop<T>& args_in, double* sums, double* products) {
  using A = Accumulate<T>;
  const GradLoop<T> args = args_in;
  const PerColumn<A, kForwardCoefficients> c(args.coefficients, args.coefficient_stride);
  sum_columns<kPlaces<T, kSource, 2>, A>(
      args.runs,
      [&](int64_t run, int64_t i, auto lanes) BNFUSED_INLINE_LAMBDA {
        const int64_t at = run * args.runs.stride + i;
        fetch_ahead<kSource, 2>(args.x + at, args.runs.length);
        fetch_ahead<kSource, 2>(args.grad_y + at, args.runs.length);
        return gated<T, kKind, true>(args, c.at(i), run, i, lanes);
      },
      sums, products);
}

template <class T, Layout kLayout, bool kStream, BackwardKind kKind, bool kTraining, class Round>
BNFUSED_INLINE void grad_apply_with(const GradLoop<T>& args_in, Round& round) {
  using A = Accumulate<T>;
  using V = Vec<A>;
  const GradLoop<T> args = args_in;
  const Coefficients<kLayout, A, kBackwardCoefficients> coefficients(args.coefficients, args.coefficient_stride);
  for_each_group<kTogether<kLayout, kStream>>(args.runs.count, [&](int64_t run, auto count) BNFUSED_INLINE_LAMBDA {
    constexpr bool kMayOverlap = !kStream && kKind != BackwardKind::kMaskedReLU;
    map_vectors<A, kMayOverlap>(args.runs.length, [&](int64_t i, auto lanes) BNFUSED_INLINE_LAMBDA {
      const auto& from = coefficients.at(i);
      V c[kBackwardCoefficients];
      for (int k = 0; k < kBackwardCoefficients; ++k) c[k] = from[k];
#pragma GCC unroll 4
      for (int r = 0; r < decltype(count)::value; ++r) {
        const int64_t at = (run + r) * args.runs.stride + i;
        if (args.prefetch) {
          __builtin_prefetch(args.x + at + args.prefetch, 0, 2);
          __builtin_prefetch(args.grad_y + at + args.prefetch, 0, 2);
        }
        const Pair<A> t = gated<T, kKind, kTraining>(args, c, run + r, i, lanes);
        if (args.grad_residual) store_lanes<kStream>(args.grad_residual + at, t.u, args.store_ahead, round, lanes);
        if (args.grad_x) {
          const V through_statistics = kTraining ? fma(t.v, c[kSlope], c[kOffset]) : V(A(0));
          const V grad_x = fma(t.u, c[kScale], through_statistics);
          store_lanes<kStream>(args.grad_x + at, grad_x, args.store_ahead, round, lanes);
        }
      }
    });
  });
}

template <class T, Layout kLayout, bool kStream, BackwardKind kKind>
void grad_apply(const GradLoop<T>& args) {
  rounding<T, kKind != BackwardKind::kOther>([&](auto& round) BNFUSED_INLINE_LAMBDA {
    if (args.training) {
      grad_apply_with<T, kLayout, kStream, kKind, true>(args, round);
    } else {
      grad_apply_with<T, kLayout, kStream, kKind, false>(args, round);
    }
  });
}

template <class T>
constexpr Leaves<T> make_leaves() {
  constexpr auto P = Layout::kPlanes, R = Layout::kRows;
  using F = ForwardKind;
  using B = BackwardKind;
  using S = Source;
  return {
      plane_moments<T>,
      {row_moments<T, S::kCache>, row_moments<T, S::kMemory>},
      all_trusted<Accumulate<T>>,
      merge_columns<Accumulate<T>>,
      fold,
      spread<Accumulate<T>>,
      {plane_grad_sums<T, B::kIdentity>, plane_grad_sums<T, B::kReLU>, plane_grad_sums<T, B::kMaskedReLU>,
       plane_grad_sums<T, B::kOther>},
      {{row_grad_sums<T, S::kCache, B::kIdentity>, row_grad_sums<T, S::kCache, B::kReLU>,
        row_grad_sums<T, S::kCache, B::kMaskedReLU>, row_grad_sums<T, S::kCache, B::kOther>},
       {row_grad_sums<T, S::kMemory, B::kIdentity>, row_grad_sums<T, S::kMemory, B::kReLU>,
        row_grad_sums<T, S::kMemory, B::kMaskedReLU>, row_grad_sums<T, S::kMemory, B::kOther>}},
      {{{apply<T, P, false, F::kIdentity>, apply<T, P, false, F::kReLU>, apply<T, P, false, F::kMaskedReLU>,
         apply<T, P, false, F::kOther>},
        {apply<T, P, true, F::kIdentity>, apply<T, P, true, F::kReLU>, apply<T, P, true, F::kMaskedReLU>,
         apply<T, P, true, F::kOther>}},
       {{apply<T, R, false, F::kIdentity>, apply<T, R, false, F::kReLU>, apply<T, R, false, F::kMaskedReLU>,
         apply<T, R, false, F::kOther>},
        {apply<T, R, true, F::kIdentity>, apply<T, R, true, F::kReLU>, apply<T, R, true, F::kMaskedReLU>,
         apply<T, R, true, F::kOther>}}},
      {{{grad_apply<T, P, false, B::kIdentity>, grad_apply<T, P, false, B::kReLU>,
         grad_apply<T, P, false, B::kMaskedReLU>, grad_apply<T, P, false, B::kOther>},
        {grad_apply<T, P, true, B::kIdentity>, grad_apply<T, P, true, B::kReLU>, grad_apply<T, P, true, B::kMaskedReLU>,
         grad_apply<T, P, true, B::kOther>}},
       {{grad_apply<T, R, false, B::kIdentity>, grad_apply<T, R, false, B::kReLU>,
         grad_apply<T, R, false, B::kMaskedReLU>, grad_apply<T, R, false, B::kOther>},
        {grad_apply<T, R, true, B::kIdentity>, grad_apply<T, R, true, B::kReLU>, grad_apply<T, R, true, B::kMaskedReLU>,
         grad_apply<T, R, true, B::kOther>}}},
  };
}

template <class T>
constexpr Leaves<T> kLeaves = make_leaves<T>();

template <class T>
const Leaves<T>* leaves() {
  return &kLeaves<T>;
}
template const Leaves<BFloat16>* leaves<BFloat16>();
#if !defined(BNFUSED_AVX512_BF16)  // the others are as without
template const Leaves<Float16>* leaves<Float16>();
template const Leaves<float>* leaves<float>();
template const Leaves<double>* leaves<double>();
#endif
