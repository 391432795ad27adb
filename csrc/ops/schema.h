// The ops of a library, so that another backend's library can have the same: csrc/ops/schema.cpp.
#pragma once
#include <torch/library.h>

namespace bnfused::ops {

void define(torch::Library& m);

}  // namespace bnfused::ops
