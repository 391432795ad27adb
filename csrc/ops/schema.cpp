// The contract on one screen: every op, what it reads, what it writes, what it returns.
//
// mean and invstd are float64 (C,): a float32 mean loses what the backward needs once mean / std passes 1e4.
// mask is uint8, one bit per value, and only there for ReLU with a residual; every other activation is recomputed.
// momentum None is the cumulative average: 1 / num_batches_tracked, counted with this batch.
#include "ops/schema.h"

namespace bnfused::ops {

void define(torch::Library& m) {
  m.def(
      "batch_norm_train(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? num_batches_tracked, Tensor? residual, float? momentum, float eps, int activation, "
      "float activation_param) -> (Tensor y, Tensor mean, Tensor invstd, Tensor mask)",
      {at::Tag::pt2_compliant_tag});
  // The statistics are the running ones and gradients will flow: keeps what the backward needs.
  m.def(
      "batch_norm_frozen(Tensor x, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, "
      "Tensor? residual, float eps, int activation, float activation_param) "
      "-> (Tensor y, Tensor mean, Tensor invstd, Tensor mask)",
      {at::Tag::pt2_compliant_tag});
  // flexible_layout: Inductor may pass x in another memory order than eager mode would. The ops that keep something for
  // the backward get what was traced: a mask is in the memory order of x, and the backward has to find it so.
  m.def(
      "batch_norm_eval(Tensor x, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, "
      "Tensor? residual, float eps, int activation, float activation_param) -> Tensor y",
      {at::Tag::pt2_compliant_tag, at::Tag::flexible_layout});
  // The five below are batch norm in parts, for a batch that is spread over processes.
  // Mean, standard deviation and count, packed as PackedMoments in csrc/batch_norm.h says.
  m.def("batch_norm_stats(Tensor x) -> Tensor moments", {at::Tag::pt2_compliant_tag});
  // The moments of every part, one part a row; merged, if there, gets those of all of them, packed too.
  m.def(
      "batch_norm_gather_stats(Tensor moments, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? num_batches_tracked, Tensor(d!)? merged, float? momentum) -> (Tensor batch_mean, "
      "Tensor batch_var, Tensor batch_count)",
      {at::Tag::pt2_compliant_tag});
  // As batch_norm_frozen, with statistics in float64.
  m.def(
      "batch_norm_apply(Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, Tensor? residual, float eps, "
      "int activation, float activation_param) -> (Tensor y, Tensor invstd, Tensor mask)",
      {at::Tag::pt2_compliant_tag});
  // sums are (2, C), float64: those of g and of g * xhat over x, and then over the whole batch, which has count values
  // of each channel.
  m.def(
      "batch_norm_backward_reduce(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, "
      "Tensor mean, Tensor invstd, Tensor? mask, int activation, float activation_param) -> Tensor sums",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "batch_norm_backward_apply(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor mean, "
      "Tensor invstd, Tensor? mask, Tensor sums, Tensor count, int activation, float activation_param, "
      "bool[2] output_mask) -> (Tensor grad_x, Tensor grad_residual)",
      {at::Tag::pt2_compliant_tag});
  // A gradient that output_mask does not ask for comes back with no elements.
  m.def(
      "batch_norm_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor mean, "
      "Tensor invstd, Tensor? mask, int activation, float activation_param, bool training, bool[4] output_mask) "
      "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)",
      {at::Tag::pt2_compliant_tag});
}

}  // namespace bnfused::ops
