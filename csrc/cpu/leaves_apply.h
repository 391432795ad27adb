// The loop that writes y. Included like vec.h, after leaves_lanes.h and epilogue.h.

template <class T, Layout kLayout, bool kStream, ForwardKind kKind, class Round>
BNFUSED_INLINE void apply_with(const ApplyLoop<T>& args_in, Round& round) {
  using A = Accumulate<T>;
  using V = Vec<A>;
  const ApplyLoop<T> args = args_in;
  for_each_few<kRowsAtOnce<kLayout, kStream>>(args.runs.count, [&](int64_t run, auto count) BNFUSED_INLINE_LAMBDA {
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
