// What the drivers of every op and every traversal share. A driver is the order of things for one op and one traversal:
// planes.h, short_planes.h and rows.h have the parts of each traversal, plan.h has the decisions, and the loops are in
// the leaves.
#pragma once
#include <ATen/Parallel.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <exception>
#include <initializer_list>
#include <memory>
#include <new>

#include "cpu/leaves.h"
#include "cpu/per_channel.h"
#include "cpu/plan.h"

#if !defined(_OPENMP)
// g++ compiles `#pragma omp parallel` to calls of these functions, which torch's libgomp has. The OpenMP runtime of clang
// would be a second one in the process, with threads of its own.
extern "C" void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);
extern "C" int omp_get_num_threads();
extern "C" int omp_get_thread_num();
#endif

namespace bnfused::cpu {

template <class F>
void with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat16:
      return f(Float16{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat64:
      return f(double{});
  }
}

// at::parallel_for, after which every thread sees the values that were streamed past the caches.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, F f) {
  const auto fenced = [&](int64_t first, int64_t last) {
    f(first, last);
#if defined(__x86_64__)
    _mm_sfence();
#endif
  };
#if !defined(_OPENMP)  // where at::parallel_for runs on this thread alone
  grain = std::max<int64_t>(grain, 1);
  if (end - begin > grain && !at::in_parallel_region() && at::get_num_threads() > 1) {
    std::atomic_flag failed = ATOMIC_FLAG_INIT;
    std::exception_ptr error;
    auto part = [&] {  // cut as at::parallel_for cuts, so that the results are the same
      const int64_t threads = std::min<int64_t>(omp_get_num_threads(), (end - begin + grain - 1) / grain);
      const int64_t size = (end - begin + threads - 1) / threads, first = begin + omp_get_thread_num() * size;
      try {
        at::parallel_for(first, std::min(end, first + size), grain, fenced);
      } catch (...) {
        if (!failed.test_and_set()) error = std::current_exception();
      }
    };
    GOMP_parallel([](void* p) { (*static_cast<decltype(part)*>(p))(); }, &part, 0, 0);  // on all threads of torch
    if (error) std::rethrow_exception(error);
    return;
  }
#endif
  at::parallel_for(begin, end, grain, fenced);
}

// Room for `size` values and at least one vector more, in whole vectors. So a vector may be read or written at any
// value, and an array that comes after this one is aligned again.
constexpr int64_t padded(int64_t size) { return (size + 2 * kMaxLanes - 1) / kMaxLanes * kMaxLanes; }

struct FreeLines {
  void operator()(void* p) const { ::operator delete[](p, std::align_val_t(kLineBytes)); }
};
template <class A>
using Scratch = std::unique_ptr<A[], FreeLines>;

// Uninitialised, padded, and on a line. Vectors of coefficients that straddle two lines would take two loads each, in
// every row (the last pass of the backward, 6272 rows of 512: 1.0 instead of 0.48 ms).
template <class A>
Scratch<A> scratch(int64_t size) {
  return Scratch<A>(new (std::align_val_t(kLineBytes)) A[padded(size)]);
}

// Whether all of these start on a cache line; an output that is not there is nullptr.
inline bool on_lines(std::initializer_list<const void*> outputs) {
  return std::all_of(outputs.begin(), outputs.end(),
                     [](const void* y) { return reinterpret_cast<uintptr_t>(y) % kLineBytes == 0; });
}

// What TrainArgs and ApplyArgs ask of the plan.
template <class Args>
CpuRequest forward_request(const Args& args) {
  CpuRequest request;
  request.residual = args.residual != nullptr;
  request.mask = args.mask != nullptr;
  request.aligned = on_lines({args.y});
  return request;
}

template <class Args>
ForwardKind forward_kind(const Args& args) {
  if (args.mask) return ForwardKind::kMaskedReLU;
  if (args.epilogue.activation == Activation::kIdentity) return ForwardKind::kIdentity;
  return args.epilogue.activation == Activation::kReLU ? ForwardKind::kReLU : ForwardKind::kOther;
}

// What the leaves of a forward take from TrainArgs or ApplyArgs, for a part of the work that starts at value `at` and
// at byte `mask_at` of the mask. The caller adds runs and coefficients.
template <class T, class Args>
ApplyLoop<T> apply_loop(const Args& args, int64_t at, int64_t mask_at) {
  ApplyLoop<T> a{};
  a.x = static_cast<const T*>(args.x) + at;
  a.residual = args.residual ? static_cast<const T*>(args.residual) + at : nullptr;
  a.y = static_cast<T*>(args.y) + at;
  a.mask = args.mask ? args.mask + mask_at : nullptr;
  a.store_ahead = store_ahead();
  a.epilogue = args.epilogue;
  return a;
}

}  // namespace bnfused::cpu
