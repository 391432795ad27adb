// The ops on CPU tensors. This file also defines the library that the ops of every device belong to, because every
// build has this file.
#include <ATen/ops/empty_strided_native.h>
#include <torch/library.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/backend.h"
#include "ops/ops.h"
#include "ops/schema.h"

namespace {

// The first write to each new 4 KiB page of memory costs a page fault. For 49 MB the faults take 27 ms, more than all
// of batch norm. glibc maps blocks of 32 MiB and more afresh every time, and returns the top of the heap to the system
// whenever enough of it is free. From this size on we request huge pages, which divide the number of faults by 512
// (measured: a training step of 25 MB activations with ReLU and residual is up to 4 times faster).
constexpr size_t kHugePagesFromBytes = 8 * 1024 * 1024;

// Whether `rows` has the memory order of `planes`, except that its channels are innermost. Both are dense and have the
// same shape.
bool is_rows_of(const at::Tensor& rows, const at::Tensor& planes) {
  const int64_t channels = planes.size(1);
  if (rows.stride(1) != 1 || channels == 1) return false;
  for (int64_t d = 0; d < planes.dim(); ++d) {
    if (d == 1 || planes.size(d) == 1) continue;
    const bool inside = planes.stride(d) < planes.stride(1);
    if (rows.stride(d) != planes.stride(d) * (inside ? channels : 1)) return false;
  }
  return true;
}

struct Cpu {
  static void batch_norm_stats(const bnfused::MomentsArgs& args, c10::Device) { bnfused::cpu::batch_norm_stats(args); }
  static void batch_norm_gather_stats(const bnfused::GatherArgs& args, c10::Device) {
    bnfused::cpu::batch_norm_gather_stats(args);
  }
  static void batch_norm_train(const bnfused::TrainArgs& args, c10::Device) { bnfused::cpu::batch_norm_train(args); }
  static void batch_norm_apply(const bnfused::ApplyArgs& args, c10::Device) { bnfused::cpu::batch_norm_apply(args); }
  static void batch_norm_backward(const bnfused::BackwardArgs& args, c10::Device) {
    bnfused::cpu::batch_norm_backward(args);
  }

  static void copy(const at::Tensor& from, const at::Tensor& to) {
    const bool dense = from.is_non_overlapping_and_dense() && from.numel() > 0;
    const bool to_planes = dense && is_rows_of(from, to);
    if (!to_planes && !(dense && is_rows_of(to, from))) {
      to.copy_(from);
      return;
    }
    const bnfused::Problem p = bnfused::ops::problem_of(to_planes ? to : from);
    bnfused::cpu::transpose(from.const_data_ptr(), to.mutable_data_ptr(), p.outer, to_planes ? p.inner : p.channels,
                            to_planes ? p.channels : p.inner, from.element_size());
  }

  static at::Tensor empty_like(const at::Tensor& x) {
    at::Tensor y = at::native::empty_strided_cpu(x.sizes(), x.strides(), x.scalar_type());  // x is dense
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (y.nbytes() >= kHugePagesFromBytes) {
      constexpr uintptr_t kPage = 4096;
      const auto begin = (reinterpret_cast<uintptr_t>(y.mutable_data_ptr()) + kPage - 1) / kPage * kPage;
      const auto end = (reinterpret_cast<uintptr_t>(y.mutable_data_ptr()) + y.nbytes()) / kPage * kPage;
      madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: if it fails, nothing changes
    }
#endif
    return y;
  }
};

}  // namespace

TORCH_LIBRARY(bnfused, m) { bnfused::ops::define(m); }

TORCH_LIBRARY_IMPL(bnfused, CPU, m) { bnfused::ops::implement<Cpu>(m); }
