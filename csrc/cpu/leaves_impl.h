// All loops, and the table of them that leaves.h declares. Included once for each instruction set, inside a namespace
// of its own. Each header needs those above it; the comments between keep clang-format from sorting them.

// A vector of values.
#include "cpu/vec.h"
// The activations of one.
#include "cpu/epilogue.h"
// The walk over a run.
#include "cpu/leaves_lanes.h"
// Loops of the forward.
#include "cpu/leaves_apply.h"
#include "cpu/leaves_sums.h"
// Loops of the backward.
#include "cpu/leaves_grad.h"

template <class T, Source kSource>
constexpr void add_row_sums(Leaves<T>& leaves) {
  using B = BackwardKind;
  leaves.row_moments(kSource) = row_moments<T, kSource>;
  leaves.row_grad_sums(kSource, B::kIdentity) = row_grad_sums<T, kSource, B::kIdentity>;
  leaves.row_grad_sums(kSource, B::kReLU) = row_grad_sums<T, kSource, B::kReLU>;
  leaves.row_grad_sums(kSource, B::kMaskedReLU) = row_grad_sums<T, kSource, B::kMaskedReLU>;
  leaves.row_grad_sums(kSource, B::kOther) = row_grad_sums<T, kSource, B::kOther>;
}

template <class T, Layout kLayout, bool kStream>
constexpr void add_apply(Leaves<T>& leaves) {
  using F = ForwardKind;
  using B = BackwardKind;
  leaves.apply(kLayout, kStream, F::kIdentity) = apply<T, kLayout, kStream, F::kIdentity>;
  leaves.apply(kLayout, kStream, F::kReLU) = apply<T, kLayout, kStream, F::kReLU>;
  leaves.apply(kLayout, kStream, F::kMaskedReLU) = apply<T, kLayout, kStream, F::kMaskedReLU>;
  leaves.apply(kLayout, kStream, F::kOther) = apply<T, kLayout, kStream, F::kOther>;
  leaves.grad_apply(kLayout, kStream, B::kIdentity) = grad_apply<T, kLayout, kStream, B::kIdentity>;
  leaves.grad_apply(kLayout, kStream, B::kReLU) = grad_apply<T, kLayout, kStream, B::kReLU>;
  leaves.grad_apply(kLayout, kStream, B::kMaskedReLU) = grad_apply<T, kLayout, kStream, B::kMaskedReLU>;
  leaves.grad_apply(kLayout, kStream, B::kOther) = grad_apply<T, kLayout, kStream, B::kOther>;
}

template <class T>
constexpr Leaves<T> make_leaves() {
  using B = BackwardKind;
  Leaves<T> leaves{};
  leaves.plane_moments = plane_moments<T>;
  leaves.all_trusted = all_trusted<Accumulate<T>>;
  leaves.merge_columns = merge_columns<Accumulate<T>>;
  leaves.fold = fold;
  leaves.spread = spread<Accumulate<T>>;
  leaves.plane_grad_sums(B::kIdentity) = plane_grad_sums<T, B::kIdentity>;
  leaves.plane_grad_sums(B::kReLU) = plane_grad_sums<T, B::kReLU>;
  leaves.plane_grad_sums(B::kMaskedReLU) = plane_grad_sums<T, B::kMaskedReLU>;
  leaves.plane_grad_sums(B::kOther) = plane_grad_sums<T, B::kOther>;
  add_row_sums<T, Source::kCache>(leaves);
  add_row_sums<T, Source::kMemory>(leaves);
  add_apply<T, Layout::kPlanes, false>(leaves);
  add_apply<T, Layout::kPlanes, true>(leaves);
  add_apply<T, Layout::kRows, false>(leaves);
  add_apply<T, Layout::kRows, true>(leaves);
  return leaves;
}

template <class T>
constexpr Leaves<T> kLeaves = make_leaves<T>();

template <class T>
const Leaves<T>* leaves() {
  return &kLeaves<T>;
}
template const Leaves<BFloat16>* leaves<BFloat16>();
#if !defined(BNFUSED_AVX512_BF16)  // only bfloat16 has loops of its own there
template const Leaves<Float16>* leaves<Float16>();
template const Leaves<float>* leaves<float>();
template const Leaves<double>* leaves<double>();
#endif
