// The loops themselves. Included once for each instruction set, inside a namespace of its own, after vec.h and
// epilogue.h; ends in kLeaves<T>, the table that leaves.h declares.

// Bytes ahead of a store to ask for its line in exclusive state: the read-for-ownership of a line that is not in L2
// then overlaps the arithmetic. 4 KiB measured best for outputs that fit the last-level cache.
constexpr int kStoreAhead = 4096;
constexpr int kLine = 64;

// Calls body(i, full) for every whole vector of [0, n) and body(i, lanes) for what is left over.
template <class A, class Body>
BNFUSED_INLINE void for_each_vector(int64_t n, Body body) {
  constexpr int W = Vec<A>::kSize;
  int64_t i = 0;
  for (; i + W <= n; i += W) body(i, std::integral_constant<int, W>{});
  if (i < n) body(i, static_cast<int>(n - i));
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

template <bool kStream, class T>
BNFUSED_INLINE void store_lanes(T* p, Vec<Accumulate<T>> a, std::integral_constant<int, kLanes<Accumulate<T>>>) {
  if constexpr (kStream) {
    stream(p, a);
  } else {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + kStoreAhead, 1, 2);
    store(p, a);
  }
}
template <bool kStream, class T>
BNFUSED_INLINE void store_lanes(T* p, Vec<Accumulate<T>> a, int lanes) {
  store_first(p, a, lanes);
}

// ---- coefficients: one set for all columns, or one for each

template <class A, int kCount>
struct Broadcast {
  Vec<A> values[kCount];
  BNFUSED_INLINE Broadcast(const A* coefficients, int64_t stride) {
    for (int k = 0; k < kCount; ++k) values[k] = Vec<A>(coefficients[k * stride]);
  }
  BNFUSED_INLINE Vec<A> get(int k, int64_t) const { return values[k]; }
};

template <class A, int kCount>
struct PerColumn {
  const A* coefficients;
  int64_t stride;
  BNFUSED_INLINE PerColumn(const A* c, int64_t s) : coefficients(c), stride(s) {}
  BNFUSED_INLINE Vec<A> get(int k, int64_t column) const { return load(coefficients + k * stride + column); }
};

template <Layout kLayout, class A, int kCount>
using Coefficients = std::conditional_t<kLayout == Layout::kPlanes, Broadcast<A, kCount>, PerColumn<A, kCount>>;

// ---- forward

template <class T, Layout kLayout, bool kStream, Forward kKind>
void apply(const ApplyArgs<T>& args) {
  using A = Accumulate<T>;
  using V = Vec<A>;
  const Epilogue epilogue = args.epilogue;
  const int64_t ahead = args.prefetch;
  for (int64_t run = 0; run < args.runs.count; ++run) {
    const int64_t offset = run * args.runs.stride;
    const Coefficients<kLayout, A, kForwardCoefficients> c(args.coefficients + run * args.coefficient_step,
                                                           args.coefficient_stride);
    const T* x = args.x + offset;
    const T* residual = args.residual ? args.residual + offset : nullptr;
    T* y = args.y + offset;
    uint8_t* mask = args.mask ? args.mask + run * args.runs.mask_stride : nullptr;
    for_each_vector<A>(args.runs.length, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      if (ahead) __builtin_prefetch(x + i + ahead, 0, 2);
      V z = fma(load_lanes(x + i, lanes, V(A(0))) - c.get(kMean, i), c.get(kScale, i), c.get(kShift, i));
      if (residual) z = z + load_lanes(residual + i, lanes, V(A(0)));
      if constexpr (kKind == Forward::kReLU) {
        if (mask) {
          const auto passes = ~(z <= V(kRoundsToZero<T>));
          if constexpr (std::is_same_v<decltype(lanes), int>) {
            store_bits_first<A>(mask + i / 8, passes, lanes);
          } else {
            store_bits<A>(mask + i / 8, passes);
          }
        }
        z = relu(z);
      }
      if constexpr (kKind == Forward::kOther) z = value(epilogue, z);
      store_lanes<kStream>(y + i, z, lanes);
    });
  }
  if constexpr (kStream) stream_fence();
}

// ---- sums over all values of a slab, or over the rows of each column

// Two sums of products over one vector: first += u, second += u * v for the term's (u, v).
template <class A>
struct Pair {
  Vec<A> u, v;
};

template <class A, class Term>
BNFUSED_INLINE Sums sum_all(Runs runs, Term term) {
  using V = Vec<A>;
  constexpr int W = V::kSize;
  V first[4], second[4];
  for (int k = 0; k < 4; ++k) first[k] = second[k] = V(A(0));
  const auto add = [&](int k, Pair<A> t) __attribute__((always_inline)) {
    first[k] = first[k] + t.u;
    second[k] = fma(t.u, t.v, second[k]);
  };
  constexpr std::integral_constant<int, W> full{};
  for (int64_t run = 0; run < runs.count; ++run) {
    int64_t i = 0;
    for (; i + 4 * W <= runs.length; i += 4 * W) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) add(k, term(run, i + k * W, full));
    }
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
  }
  return {sum_lanes((first[0] + first[1]) + (first[2] + first[3])),
          sum_lanes((second[0] + second[1]) + (second[2] + second[3]))};
}

// kVectors columns' worth of vectors at `column`, down all rows, in 4 / kVectors chains so that additions do not wait
// for one another.
template <int kVectors, class A, class Term>
BNFUSED_INLINE void sum_tile(int64_t rows, int64_t column, Term term, A* sums, A* products) {
  using V = Vec<A>;
  constexpr int W = V::kSize;
  constexpr int kChains = 4 / kVectors;
  constexpr std::integral_constant<int, W> full{};
  V first[kChains][kVectors], second[kChains][kVectors];
  for (int k = 0; k < kChains; ++k) {
    for (int v = 0; v < kVectors; ++v) first[k][v] = second[k][v] = V(A(0));
  }
  const auto add = [&](int k, int64_t row) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const Pair<A> t = term(row, column + v * W, full);
      first[k][v] = first[k][v] + t.u;
      second[k][v] = fma(t.u, t.v, second[k][v]);
    }
  };
  int64_t row = 0;
  for (; row + kChains <= rows; row += kChains) {
#pragma GCC unroll 4
    for (int k = 0; k < kChains; ++k) add(k, row + k);
  }
  for (; row < rows; ++row) add(0, row);
  for (int v = 0; v < kVectors; ++v) {
    V a = first[0][v], b = second[0][v];
    for (int k = 1; k < kChains; ++k) {
      a = a + first[k][v];
      b = b + second[k][v];
    }
    store(sums + column + v * W, a);
    store(products + column + v * W, b);
  }
}

// Rows that are wide are taken eight at a time, left to right, so that memory is read along the rows and the sums of a
// column are loaded once for eight of its values.
template <class A, class Term>
BNFUSED_INLINE void sum_columns(Runs runs, Term term, A* sums, A* products) {
  using V = Vec<A>;
  constexpr int W = V::kSize;
  constexpr int64_t kTileColumns = 8 * W;
  const int64_t width = runs.length, rows = runs.count;
  if (width <= kTileColumns && width % W == 0) {
    int64_t column = 0;
    for (; column + 4 * W <= width; column += 4 * W) sum_tile<4>(rows, column, term, sums, products);
    if (column + 2 * W <= width) {
      sum_tile<2>(rows, column, term, sums, products);
      column += 2 * W;
    }
    if (column < width) sum_tile<1>(rows, column, term, sums, products);
    return;
  }
  constexpr int kRows = 8;
  int64_t row = 0;
  const auto sweep = [&](auto count) __attribute__((always_inline)) {
    constexpr int kCount = decltype(count)::value;
    const bool start = row == 0;
    for_each_vector<A>(width, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      V first[2] = {V(A(0)), V(A(0))}, second[2] = {V(A(0)), V(A(0))};
#pragma GCC unroll 8
      for (int r = 0; r < kCount; ++r) {
        const Pair<A> t = term(row + r, i, lanes);
        first[r % 2] = first[r % 2] + t.u;
        second[r % 2] = fma(t.u, t.v, second[r % 2]);
      }
      const V a = first[0] + first[1], b = second[0] + second[1];
      store(sums + i, start ? a : load(sums + i) + a);
      store(products + i, start ? b : load(products + i) + b);
    });
    row += kCount;
  };
  for (; row + kRows <= rows;) sweep(std::integral_constant<int, kRows>{});
  for (; row < rows;) sweep(std::integral_constant<int, 1>{});
}

template <class T>
Sums plane_moments(const T* x, Runs runs, Accumulate<T> shift) {
  using A = Accumulate<T>;
  const Vec<A> k(shift);
  return sum_all<A>(runs, [=](int64_t run, int64_t i, auto lanes) __attribute__((always_inline)) {
    const Vec<A> d = load_lanes(x + run * runs.stride + i, lanes, k) - k;
    return Pair<A>{d, d};
  });
}

template <class T>
void row_moments(const T* x, Runs runs, const Accumulate<T>* shift, Accumulate<T>* sums, Accumulate<T>* squares) {
  using A = Accumulate<T>;
  sum_columns<A>(
      runs,
      [=](int64_t run, int64_t i, auto lanes) __attribute__((always_inline)) {
        const Vec<A> k = load(shift + i);
        const Vec<A> d = load_lanes(x + run * runs.stride + i, lanes, k) - k;
        return Pair<A>{d, d};
      },
      sums, squares);
}

// ---- backward

// g = grad_y * act'(z) for the vector at (run, i), and d = x - mean.
template <class T, Backward kKind, class C>
BNFUSED_INLINE Pair<Accumulate<T>> gated(const GradArgs<T>& args, const C& c, int64_t run, int64_t i, auto lanes) {
  using A = Accumulate<T>;
  using V = Vec<A>;
  const int64_t at = run * args.runs.stride + i;
  const V mean = c.get(kMean, i);
  const V d = load_lanes(args.x + at, lanes, mean) - mean;
  V g = load_lanes(args.grad_y + at, lanes, V(A(0)));
  if constexpr (kKind == Backward::kReLU) {
    const V z = fma(d, c.get(kScale, i), c.get(kShift, i));
    g = select<A>(z <= V(kRoundsToZero<T>), V(A(0)), g);
  } else if constexpr (kKind == Backward::kMaskedReLU) {
    const uint8_t* bits = args.mask + run * args.runs.mask_stride + i / 8;
    if constexpr (std::is_same_v<decltype(lanes), int>) {
      g = select<A>(load_bits_first<A>(bits, lanes), g, V(A(0)));
    } else {
      g = select<A>(load_bits<A>(bits), g, V(A(0)));
    }
  } else if constexpr (kKind == Backward::kOther) {
    V z = fma(d, c.get(kScale, i), c.get(kShift, i));
    if (args.residual) z = z + load_lanes(args.residual + at, lanes, V(A(0)));
    g = gradient(args.epilogue, g, z);
  }
  return {g, d};
}

template <class T, Backward kKind>
Sums plane_grad_sums(const GradArgs<T>& args_in) {
  using A = Accumulate<T>;
  const GradArgs<T> args = args_in;
  const Broadcast<A, kForwardCoefficients> c(args.coefficients, args.coefficient_stride);
  return sum_all<A>(args.runs, [&](int64_t run, int64_t i, auto lanes)
                                   __attribute__((always_inline)) { return gated<T, kKind>(args, c, run, i, lanes); });
}

template <class T, Backward kKind>
void row_grad_sums(const GradArgs<T>& args_in, Accumulate<T>* sums, Accumulate<T>* products) {
  using A = Accumulate<T>;
  const GradArgs<T> args = args_in;
  const PerColumn<A, kForwardCoefficients> c(args.coefficients, args.coefficient_stride);
  sum_columns<A>(
      args.runs,
      [&](int64_t run, int64_t i, auto lanes)
          __attribute__((always_inline)) { return gated<T, kKind>(args, c, run, i, lanes); },
      sums, products);
}

template <class T, Layout kLayout, bool kStream, Backward kKind>
void grad_apply(const GradArgs<T>& args_in) {
  using A = Accumulate<T>;
  using V = Vec<A>;
  const GradArgs<T> args = args_in;
  const Coefficients<kLayout, A, kBackwardCoefficients> c(args.coefficients, args.coefficient_stride);
  const int64_t ahead = args.prefetch;
  for (int64_t run = 0; run < args.runs.count; ++run) {
    const int64_t offset = run * args.runs.stride;
    for_each_vector<A>(args.runs.length, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      if (ahead) {
        __builtin_prefetch(args.x + offset + i + ahead, 0, 2);
        __builtin_prefetch(args.grad_y + offset + i + ahead, 0, 2);
      }
      const Pair<A> t = gated<T, kKind>(args, c, run, i, lanes);
      if (args.grad_residual) store_lanes<kStream>(args.grad_residual + offset + i, t.u, lanes);
      if (args.grad_x) {
        const V centred = fma(t.v, c.get(kSlope, i), c.get(kOffset, i));
        store_lanes<kStream>(args.grad_x + offset + i, fma(t.u, c.get(kScale, i), centred), lanes);
      }
    });
  }
  if constexpr (kStream) stream_fence();
}

template <class T>
constexpr Leaves<T> make_leaves() {
  constexpr auto P = Layout::kPlanes, R = Layout::kRows;
  using F = Forward;
  using B = Backward;
  return {
      plane_moments<T>,
      row_moments<T>,
      {plane_grad_sums<T, B::kIdentity>, plane_grad_sums<T, B::kReLU>, plane_grad_sums<T, B::kMaskedReLU>,
       plane_grad_sums<T, B::kOther>},
      {row_grad_sums<T, B::kIdentity>, row_grad_sums<T, B::kReLU>, row_grad_sums<T, B::kMaskedReLU>,
       row_grad_sums<T, B::kOther>},
      {{{apply<T, P, false, F::kIdentity>, apply<T, P, false, F::kReLU>, apply<T, P, false, F::kOther>},
        {apply<T, P, true, F::kIdentity>, apply<T, P, true, F::kReLU>, apply<T, P, true, F::kOther>}},
       {{apply<T, R, false, F::kIdentity>, apply<T, R, false, F::kReLU>, apply<T, R, false, F::kOther>},
        {apply<T, R, true, F::kIdentity>, apply<T, R, true, F::kReLU>, apply<T, R, true, F::kOther>}}},
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
template const Leaves<Float16>* leaves<Float16>();
template const Leaves<BFloat16>* leaves<BFloat16>();
template const Leaves<float>* leaves<float>();
template const Leaves<double>* leaves<double>();
