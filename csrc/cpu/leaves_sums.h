// Sums over all values of a slab, or over the rows of each column; and the moments of x that are made of them. Included
// like vec.h, after leaves_lanes.h.

// One vector's share of two sums: first += u, second += u * v.
template <class A>
struct Pair {
  Vec<A> u, v;
};

// Values that a lane adds up in A before its sum moves to float64. With eight values, grad_weight was two units in the
// last place off, where torch's float64 sums were one off.
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

// The sums of kVectors vectors of columns, from `column` on, down all rows.
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

// Whether rows are up to four whole vectors: their sums stay in registers.
template <class A>
BNFUSED_INLINE bool is_tile(int64_t width) {
  return width <= 4 * Vec<A>::kSize && width % Vec<A>::kSize == 0;
}

// Wide rows are summed at this many places at once. From memory, four streams of lines arrive the fastest (25 MB, 1 KiB
// rows: the sums of the backward take 1.04 ms from two places of two tensors, 1.34 ms from eight). From the cache, and
// where a line holds twice the values, more places are less work.
template <class T, Source kSource, int kTensors>
constexpr int kPlaces = kSource == Source::kCache || kIsHalf<T> ? 8 : 4 / kTensors;

// Prefetches the lines ahead of p: 16 KiB ahead, shared by the streams. The rows of a tile are one stream of each
// tensor. Rows in the cache are not prefetched, where a prefetch costs as much as a load.
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
// values. The rows are far apart and each of these places is read in order, because neighbouring rows confuse the
// hardware's prefetch.
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
  // The arrays are padded, so reading past `columns` is safe. Writing is not: a short last row must leave the other
  // columns as they are.
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
