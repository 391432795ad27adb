// The ops on CPU tensors; and the library that the ops of every device belong to, for this file is in every build.
#include <ATen/ops/empty_strided_native.h>
#include <torch/library.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/backend.h"
#include "ops/ops.h"

namespace {

// Memory that is new to the process costs a fault for each 4 KiB page when it is first written: for 49 MB that is 27
// ms, more than all of batch norm. glibc maps blocks of 32 MiB and more afresh every time, and hands the top of the
// heap back whenever enough of it is free. From this size on, huge pages are asked for, which cut the faults by 512
// (measured: a training step of 25 MB activations with ReLU and residual up to 4 times faster).
constexpr size_t kHugePagesFromBytes = 8 * 1024 * 1024;

// Whether `rows` holds what `planes` does, both dense and of one shape, with the channels innermost.
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
      madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: failing changes nothing
    }
#endif
    return y;
  }
};

}  // namespace

TORCH_LIBRARY(bnfused, m) { bnfused::ops::define(m); }

TORCH_LIBRARY_IMPL(bnfused, CPU, m) { bnfused::ops::implement<Cpu>(m); }
