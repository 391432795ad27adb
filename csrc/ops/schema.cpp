// The contract on one screen: every op, what it reads, what it writes, what it returns.
//
// mean and invstd are float64 (C,): a float32 mean loses what the backward needs once mean / std passes 1e4.
// mask is uint8, with one bit for each value. Only ReLU with a residual has one; other activations are recomputed.
// If momentum is None, the average is cumulative: the momentum is 1 / num_batches_tracked, with this batch counted.
#include "ops/ops.h"

namespace bnfused::ops {

void define(torch::Library& m) {
  const auto def = [&](const char* schema) { m.def(schema, {at::Tag::pt2_compliant_tag}); };
  def("batch_norm_train(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? num_batches_tracked, Tensor? residual, float? momentum, float eps, int activation, "
      "float activation_param) -> (Tensor y, Tensor mean, Tensor invstd, Tensor mask)");
  // Uses the running statistics, and keeps what the backward needs.
  def("batch_norm_frozen(Tensor x, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, "
      "Tensor? residual, float eps, int activation, float activation_param) "
      "-> (Tensor y, Tensor mean, Tensor invstd, Tensor mask)");
  // flexible_layout: Inductor may pass x in another memory order than eager mode would. The ops that save a mask must
  // get x as it was traced, because the mask is in the memory order of x, and the backward relies on that.
  m.def(
      "batch_norm_eval(Tensor x, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, "
      "Tensor? residual, float eps, int activation, float activation_param) -> Tensor y",
      {at::Tag::pt2_compliant_tag, at::Tag::flexible_layout});
  // The next five ops are batch norm in parts, for a batch that is spread over processes.
  // moments: mean, standard deviation and count, packed as PackedMoments in csrc/batch_norm.h says.
  def("batch_norm_stats(Tensor x) -> Tensor moments");
  // moments has one row for each part. merged, if it is given, gets the packed moments of the whole batch.
  def("batch_norm_gather_stats(Tensor moments, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? num_batches_tracked, Tensor(d!)? merged, float? momentum) -> (Tensor batch_mean, "
      "Tensor batch_var, Tensor batch_count)");
  // The same as batch_norm_frozen, with statistics in float64.
  def("batch_norm_apply(Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, Tensor? residual, float eps, "
      "int activation, float activation_param) -> (Tensor y, Tensor invstd, Tensor mask)");
  // sums (2, C), float64: the sums of g and of g * xhat. The reduce returns those over x. The apply takes those over
  // the whole batch, which has count values of each channel.
  def("batch_norm_backward_reduce(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, "
      "Tensor mean, Tensor invstd, Tensor? mask, int activation, float activation_param) -> Tensor sums");
  def("batch_norm_backward_apply(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor mean, "
      "Tensor invstd, Tensor? mask, Tensor sums, Tensor count, int activation, float activation_param, "
      "bool[2] output_mask) -> (Tensor grad_x, Tensor grad_residual)");
  // A gradient that output_mask does not ask for has no elements.
  def("batch_norm_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor mean, "
      "Tensor invstd, Tensor? mask, int activation, float activation_param, bool training, bool[4] output_mask) "
      "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)");
}

}  // namespace bnfused::ops
