// The two loops of the backward: the sums, and grad_x with grad_residual. Included like vec.h, after leaves_sums.h and
// epilogue.h.

// g = grad_y * act'(z) for the vector at (run, i), and d = x - mean. d is 0 where neither this function nor the caller
// needs it.
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
  for_each_few<kRowsAtOnce<kLayout, kStream>>(args.runs.count, [&](int64_t run, auto count) BNFUSED_INLINE_LAMBDA {
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
