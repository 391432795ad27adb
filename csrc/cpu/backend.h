// The CPU backend's entries, one source file each.
#pragma once
#include "batch_norm.h"

namespace bnfused::cpu {

void batch_norm_stats(const MomentsArgs& args);
void batch_norm_train(const TrainArgs& args);
void batch_norm_eval(const EvalArgs& args);
void batch_norm_backward(const BackwardArgs& args);

}  // namespace bnfused::cpu
