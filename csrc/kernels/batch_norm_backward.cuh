// The backward. g is the gradient before the activation, and d = x - mean:
//
//   grad_bias = sum(g)    grad_weight = invstd * sum(g * d)    grad_residual = g
//   grad_x = g * scale + d * slope + offset    with scale = weight * invstd
//   slope = -scale * invstd^2 * sum(g * d) / n    offset = -scale * sum(g) / n
//
// In training, the sums and n are those of the whole batch, of which x may be a part. Otherwise slope and offset are 0.
//
//   reduce  reads once grad_y, x, and the residual or the mask that the activation needs; writes a GradSums for each
//           channel and part, and the gradients of the tensors if they do not depend on the sums
//   apply   reads the same once more; writes grad_x and grad_residual
//   blocks  Rows: a tile of columns x a part of the rows. Planes: a channel x a part of its units; to apply, a run
//   needs   workspace for the partials and for slope and offset; tickets that are 0 before and after
// batch_norm_resident.cuh does both in one launch.
#pragma once
#include "kernels/accumulators.cuh"
#include "kernels/pointwise.cuh"
#include "kernels/source.cuh"
#include "kernels/sweep.cuh"

namespace bnfused {

struct Slope {
  double slope = 0, offset = 0;  // of grad_x, in training
};

template <class A>
struct GradAffine {
  Affine<A> forward;
  A slope, offset;
};

// Computes and writes everything that follows from the sums of one channel, and makes the constants of the apply.
struct BackwardConstants {
  PerChannel weight, bias;
  const double *mean, *invstd;
  PerChannel grad_weight, grad_bias;   // out, each may be absent
  Slope* slopes;                       // (channels), nullptr if grad_x waits for no sums over x
  double per_value;                    // 1 / n
  PerChannel sum_grad, sum_grad_xhat;  // if x is a part of a batch: the sums of the whole, and its n
  const double* batch_count;

  template <class A>
  __device__ __forceinline__ void finish(int64_t c, const GradSums& sums) const {
    const double g_xhat = (sums.g_d - rest_of_mean<A>(c) * sums.g) * invstd[c];
    write(grad_weight, c, g_xhat);
    write(grad_bias, c, sums.g);
    if (slopes != nullptr) slopes[c] = slope_of<A>(c, sums.g * per_value, g_xhat * per_value);
  }

  // The constants of the first pass, which are known before the sums.
  template <class A>
  __device__ __forceinline__ Affine<A> forward(int64_t c) const {
    return Affine<A>(mean[c], invstd[c], read(weight, c, 1), read(bias, c, 0));
  }

  template <class A>
  __device__ __forceinline__ GradAffine<A> get(int64_t c) const {
    Slope s;
    if (slopes != nullptr) s = slopes[c];
    if (sum_grad) {
      const double of_batch = 1 / *batch_count;
      s = slope_of<A>(c, read(sum_grad, c, 0) * of_batch, read(sum_grad_xhat, c, 0) * of_batch);
    }
    return {forward<A>(c), A(s.slope), A(s.offset)};
  }

 private:
  // The part of the mean that is lost when it is rounded to A. Sums and slopes refer to the rounded mean.
  template <class A>
  __device__ __forceinline__ double rest_of_mean(int64_t c) const {
    return mean[c] - double(A(mean[c]));
  }

  // of_g and of_g_xhat are the means of g and of g * xhat.
  template <class A>
  __device__ __forceinline__ Slope slope_of(int64_t c, double of_g, double of_g_xhat) const {
    const double scale = read(weight, c, 1) * invstd[c];
    const double slope = -scale * invstd[c] * of_g_xhat;
    return {slope, -scale * of_g - rest_of_mean<A>(c) * slope};
  }
};

template <class T, class Act>
struct BackwardBody {
  using Value = T;
  using A = Accumulate<T>;
  using Constants = GradAffine<A>;
  static constexpr int kLoadsOfReduce = Act::template kLoads<T>;
  static constexpr int kLoads = (kLoadsOfReduce + 1) / 2;  // half, because each loads two tensors
  static constexpr bool kUnrolled = Act::kUnrolled;
  struct Loaded {
    Pack<T> grad_y, x, residual;
    unsigned mask;
  };

  const T *grad_y, *x, *residual;  // residual: only if the activation's argument is recomputed with it
  const uint8_t* mask;
  T *grad_x, *grad_residual;  // each may be nullptr
  bool training;              // if not, slope and offset are not used: 0 * infinity would be NaN
  bool wide;
  Act activation;

  __device__ __forceinline__ void load(Loaded& loaded, uint32_t unit, Span span) const {
    const int64_t at = int64_t(unit) * kUnit;
    load_unit(loaded.grad_y, grad_y + at, span, wide);
    load_unit(loaded.x, x + at, span, wide);
    if constexpr (Act::kNeedsZ) {
      if (residual != nullptr) load_unit(loaded.residual, residual + at, span, wide);
    }
    if constexpr (Act::kMasked) loaded.mask = load_global(mask + unit);
  }

  __device__ __forceinline__ bool needs_residual() const { return Act::kNeedsZ && residual != nullptr; }
  __device__ __forceinline__ uint32_t tensors() const { return 2 + needs_residual(); }  // that are kept

  __device__ __forceinline__ void fetch(const OnChip<T>& kept, uint32_t step, uint32_t unit) const {
    const int64_t at = int64_t(unit) * kUnit;
    kept.fetch(step, 0, grad_y + at);
    kept.fetch(step, 1, x + at);
    if (needs_residual()) kept.fetch(step, 2, residual + at);
  }

  // Takes the fetched tensors from shared memory, and loads the mask, whose bytes are too small for cp.async.
  __device__ __forceinline__ void receive(Loaded& loaded, const OnChip<T>& kept, uint32_t step, uint32_t unit) const {
    recall(loaded, kept, step, unit, {0, kUnit});
    if constexpr (Act::kMasked) loaded.mask = load_global(mask + unit);
  }

  // grad_y is kept with the mask applied, so the mask itself is not kept. Fetched tensors lie in shared memory already.
  __device__ __forceinline__ void keep(const Loaded& loaded, const OnChip<T>& kept, uint32_t step, bool fetched) const {
    if constexpr (Act::kMasked) {
      Pack<T> passed;
      copy_words(passed, loaded.grad_y);
#pragma unroll
      for (int k = 0; k < kUnit; ++k) {
        if (!(loaded.mask >> k & 1)) set_value(passed, k, from_accumulate<T>(0));
      }
      kept.put(step, 0, passed);
    } else if (!fetched) {
      kept.put(step, 0, loaded.grad_y);
    }
    if (fetched) return;
    kept.put(step, 1, loaded.x);
    if (needs_residual()) kept.put(step, 2, loaded.residual);
  }

  __device__ __forceinline__ void recall(Loaded& loaded, const OnChip<T>& kept, uint32_t step, uint32_t /*unit*/,
                                         Span) const {
    kept.get(step, 0, loaded.grad_y);
    kept.get(step, 1, loaded.x);
    if (needs_residual()) kept.get(step, 2, loaded.residual);
    loaded.mask = ~0u;
  }

  // Computes g and d of every value.
  template <class ConstantsOf>
  __device__ __forceinline__ void differentiate(const Loaded& loaded, ConstantsOf constants_of, A (&g)[kUnit],
                                                A (&d)[kUnit]) const {
    A z[kUnit];
#pragma unroll
    for (int k = 0; k < kUnit; ++k) {
      const Constants c = constants_of(k);
      g[k] = value_of(loaded.grad_y, k);
      const A x_k = value_of(loaded.x, k);
      d[k] = x_k - c.forward.mean;
      if constexpr (Act::kMasked) {
        g[k] = loaded.mask >> k & 1 ? g[k] : A(0);
      } else if constexpr (Act::kNeedsZ) {
        z[k] = c.forward(x_k);
        if (residual != nullptr) z[k] += value_of(loaded.residual, k);
      }
    }
    if constexpr (Act::kNeedsZ) activation.template differentiate<T>(g, z);
  }

  template <class ConstantsOf>
  __device__ __forceinline__ void store_gradients(uint32_t unit, Span span, const A (&g)[kUnit], const A (&d)[kUnit],
                                                  ConstantsOf constants_of) const {
    const int64_t at = int64_t(unit) * kUnit;
    if (grad_x != nullptr) {
      A of_x[kUnit];
#pragma unroll
      for (int k = 0; k < kUnit; ++k) {
        const Constants c = constants_of(k);
        const A given = g[k] * c.forward.scale;
        of_x[k] = training ? given + fma(d[k], c.slope, c.offset) : given;
      }
      store_unit(grad_x + at, pack_of<T>(of_x), span, wide);
    }
    if (grad_residual != nullptr) store_unit(grad_residual + at, pack_of<T>(g), span, wide);
  }

  template <class ConstantsOf>
  __device__ __forceinline__ void store(const Loaded& loaded, uint32_t unit, Span span,
                                        ConstantsOf constants_of) const {
    A g[kUnit], d[kUnit];
    differentiate(loaded, constants_of, g, d);
    store_gradients(unit, span, g, d, constants_of);
  }
};

// The sums of a short run, in A. accumulators.cuh says why runs are short.
template <class A>
struct GradRun {
  A g = 0, g_d = 0;

  __device__ __forceinline__ void add(A gradient, A d) {
    g += gradient;
    g_d = fma(gradient, d, g_d);
  }
};

// Sums for each of the 8 values of the thread's column, over its rows. With `write_gradients`, it stores gradients too.
template <class Body, class Source>
__device__ __forceinline__ void column_grad_sums(const Body& body, const Source& source, int64_t numel, const Rows& s,
                                                 const RowsThread& thread,
                                                 const ColumnConstants<Affine<typename Body::A>>& forward,
                                                 bool write_gradients, GradSums (&total)[kUnit]) {
  using A = typename Body::A;
  constexpr int kLoads = Body::kLoadsOfReduce;
  constexpr bool kInRuns = sizeof(A) < sizeof(double);  // for float64, a run would be no narrower than the sums
  if (!thread.active) return;
  const auto constants_of = [&](int k) { return typename Body::Constants{forward(k), 0, 0}; };
  const uint32_t units = uint32_t((numel + kUnit - 1) / kUnit);
  const uint32_t end = part_begin(s.rows, thread.part + 1, s.parts);
  uint32_t row = part_begin(s.rows, thread.part, s.parts) + thread.row_slot, done = 0;  // units
  while (row < end) {
    GradRun<A> run[kInRuns ? kUnit : 1];
    for (int step = 0; step < kStepsOfRun && row < end; ++step) {
      typename Body::Loaded loaded[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const uint32_t r = row + i * s.row_slots;
        const uint32_t unit = r * s.columns + thread.column;
        if (r < end && unit < units) source.load(loaded[i], unit, span_of(unit, numel), done + i);
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const uint32_t r = row + i * s.row_slots;
        const uint32_t unit = r * s.columns + thread.column;
        if (r < end && unit < units) source.keep(loaded[i], span_of(unit, numel), done + i);
      }
      done += kLoads;
      for_each_loaded<Body>(loaded, [&](int, const typename Body::Loaded& of_unit) {
        const uint32_t unit = row * s.columns + thread.column;
        if (row < end && unit < units) {
          const Span span = span_of(unit, numel);
          A g[kUnit], d[kUnit];
          body.differentiate(of_unit, constants_of, g, d);
#pragma unroll
          for (int k = 0; k < kUnit; ++k) {
            if (!span.has(k)) continue;
            if constexpr (kInRuns) {
              run[k].add(g[k], d[k]);
            } else {
              total[k].add(g[k], d[k]);
            }
          }
          if (write_gradients) body.store_gradients(unit, span, g, d, constants_of);
        }
        row += s.row_slots;
      });
    }
    if constexpr (kInRuns) {
#pragma unroll
      for (int k = 0; k < kUnit; ++k) total[k].merge({double(run[k].g), double(run[k].g_d)});
    }
  }
}

// Sums of one channel, over the thread's units of its planes.
template <class Body, class Source>
__device__ __forceinline__ GradSums plane_grad_sums(const Body& body, const Source& source, const Planes& s,
                                                    const PlanesBlock& block, const Affine<typename Body::A>& forward,
                                                    bool write_gradients) {
  using A = typename Body::A;
  constexpr int kLoads = Body::kLoadsOfReduce;
  const auto constants_of = [&](int) { return typename Body::Constants{forward, 0, 0}; };
  GradSums total;
  const auto number_of = [&](uint32_t step) { return block.begin + threadIdx.x + step * blockDim.x; };
  for (uint32_t step = 0; number_of(step) < block.end; step += kLoads) {
    typename Body::Loaded loaded[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (number_of(step + i) >= block.end) continue;
      const PlaneUnit at(s, block.channel, number_of(step + i));
      if (!at.span.empty()) source.load(loaded[i], at.unit, at.span, step + i);
    }
    for_each_loaded<Body>(loaded, [&](int i, const typename Body::Loaded& of_unit) {
      if (number_of(step + i) >= block.end) return;
      const PlaneUnit at(s, block.channel, number_of(step + i));
      if (at.span.empty()) return;
      source.keep(of_unit, at.span, step + i);
      A g[kUnit], d[kUnit];
      body.differentiate(of_unit, constants_of, g, d);
      if (write_gradients) body.store_gradients(at.unit, at.span, g, d, constants_of);
      A products[kUnit];
#pragma unroll
      for (int k = 0; k < kUnit; ++k) {
        g[k] = at.span.has(k) ? g[k] : A(0);
        products[k] = at.span.has(k) ? g[k] * d[k] : A(0);
      }
      total.merge({double(sum_in_pairs(g)), double(sum_in_pairs(products))});
    });
  }
  return total;
}

template <class T, class Act>
struct GradArgs {
  BackwardBody<T, Act> body;
  BackwardConstants constants;
  int64_t numel;
  GradSums* partials;
  unsigned* tickets;  // one for each domain of the layout, then a gate for each, if blocks wait for each other
};

template <class T, class Act>
__global__ void __launch_bounds__(kMaxThreads, 1)
    batch_norm_backward_reduce_rows(GradArgs<T, Act> args, bool write_gradients, Rows s) {
  using A = Accumulate<T>;
  using Body = BackwardBody<T, Act>;
  BNFUSED_DYNAMIC_SHARED(Affine<A>, table);
  const RowsThread thread(s);
  const ColumnConstants<Affine<A>> forward(table, s, thread,
                                           [&](uint32_t c, bool) { return args.constants.template forward<A>(c); });
  GradSums sums[kUnit];
  column_grad_sums(args.body, FromMemory<Body>{args.body}, args.numel, s, thread, forward, write_gradients, sums);
  merge_row_slots(sums, thread.row_slot, s.row_slots, thread.slot, s.tile, thread.active);
  finish_rows(sums, args.partials, args.tickets, s, thread,
              [&](uint32_t c, const GradSums& all) { args.constants.template finish<A>(c, all); });
}

template <class T, class Act>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerSm<T>)
    batch_norm_backward_reduce_planes(GradArgs<T, Act> args, bool write_gradients, Planes s) {
  using A = Accumulate<T>;
  using Body = BackwardBody<T, Act>;
  const PlanesBlock block(s);
  const Affine<A> forward = args.constants.template forward<A>(block.channel);
  GradSums sums = plane_grad_sums(args.body, FromMemory<Body>{args.body}, s, block, forward, write_gradients);
  merge_block(sums);
  finish_channel(sums, args.partials, args.tickets, s, block,
                 [&](uint32_t c, const GradSums& all) { args.constants.template finish<A>(c, all); });
}

template <class T, class Act>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerSm<T>)
    batch_norm_backward_apply_rows(BackwardBody<T, Act> body, BackwardConstants constants, int64_t numel, Rows s) {
  sweep_rows(body, numel, s, [&](uint32_t c, bool) { return constants.get<Accumulate<T>>(c); });
}

template <class T, class Act>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerSm<T>)
    batch_norm_backward_apply_planes(BackwardBody<T, Act> body, BackwardConstants constants, int64_t numel, Flat s) {
  sweep_flat(body, numel, s, [&](uint32_t c, bool) { return constants.get<Accumulate<T>>(c); });
}

}  // namespace bnfused
