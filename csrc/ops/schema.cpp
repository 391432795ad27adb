// The contract on one screen: what every op reads, writes and returns.
//
// mean and invstd are float64 (C,): a float32 mean loses what the backward needs once mean / std passes 1e4.
// mask is uint8 and has one bit per value. Only ReLU with a residual has one; the backward recomputes every other
// activation. momentum None means the cumulative average: 1 / num_batches_tracked, which already counts this batch.
#include "ops/schema.h"

namespace bnfused::ops {

void define(torch::Library& m) {
  m.def(
      "batch_norm_train(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? num_batches_tracked, Tensor? residual, float? momentum, float eps, int activation, "
      "float activation_param) -> (Tensor y, Tensor mean, Tensor invstd, Tensor mask)",
      {at::Tag::pt2_compliant_tag});
  // Normalizes with the running statistics, as in eval, but gradients will flow: it returns what the backward needs.
  m.def(
      "batch_norm_frozen(Tensor x, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, "
      "Tensor? residual, float eps, int activation, float activation_param) "
      "-> (Tensor y, Tensor mean, Tensor invstd, Tensor mask)",
      {at::Tag::pt2_compliant_tag});
  // flexible_layout: Inductor may pass x in another memory order than eager mode would. The ops that return something
  // for the backward get x in the order that was traced, because the mask is in the memory order of x and the backward
  // relies on that.
  m.def(
      "batch_norm_eval(Tensor x, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, "
      "Tensor? residual, float eps, int activation, float activation_param) -> Tensor y",
      {at::Tag::pt2_compliant_tag, at::Tag::flexible_layout});
  // The next five ops are batch norm in parts, for a batch that is spread over processes.
  // moments: mean, standard deviation and count, packed as described at PackedMoments in csrc/batch_norm.h.
  m.def("batch_norm_stats(Tensor x) -> Tensor moments", {at::Tag::pt2_compliant_tag});
  // moments has one row per part. merged, if given, receives the moments of all parts together, packed the same way.
  m.def(
      "batch_norm_gather_stats(Tensor moments, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? num_batches_tracked, Tensor(d!)? merged, float? momentum) -> (Tensor batch_mean, "
      "Tensor batch_var, Tensor batch_count)",
      {at::Tag::pt2_compliant_tag});
  // The same as batch_norm_frozen, but the statistics are float64.
  m.def(
      "batch_norm_apply(Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, Tensor? residual, float eps, "
      "int activation, float activation_param) -> (Tensor y, Tensor invstd, Tensor mask)",
      {at::Tag::pt2_compliant_tag});
  // sums is float64 of shape (2, C): the sums of g and of g * xhat. reduce computes them over x. apply takes them over
  // the whole batch, which has `count` values per channel.
  m.def(
      "batch_norm_backward_reduce(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, "
      "Tensor mean, Tensor invstd, Tensor? mask, int activation, float activation_param) -> Tensor sums",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "batch_norm_backward_apply(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor mean, "
      "Tensor invstd, Tensor? mask, Tensor sums, Tensor count, int activation, float activation_param, "
      "bool[2] output_mask) -> (Tensor grad_x, Tensor grad_residual)",
      {at::Tag::pt2_compliant_tag});
  // A gradient that output_mask does not request is returned with no elements.
  m.def(
      "batch_norm_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor mean, "
      "Tensor invstd, Tensor? mask, int activation, float activation_param, bool training, bool[4] output_mask) "
      "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)",
      {at::Tag::pt2_compliant_tag});
}

}  // namespace bnfused::ops
