// The entry points of the CPU backend. Each has a source file of its own.
#pragma once
#include "batch_norm.h"

namespace bnfused::cpu {

void batch_norm_stats(const MomentsArgs& args);
void batch_norm_gather_stats(const GatherArgs& args);
void batch_norm_train(const TrainArgs& args);
void batch_norm_apply(const ApplyArgs& args);
void batch_norm_backward(const BackwardArgs& args);

// to[o][c][r] = from[o][r][c] for values of 2, 4 or 8 bytes.
void transpose(const void* from, void* to, int64_t outer, int64_t rows, int64_t columns, int64_t item_bytes);

}  // namespace bnfused::cpu
