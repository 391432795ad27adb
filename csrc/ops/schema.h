// Defines the ops of csrc/ops/schema.cpp in a library. A second library, of another backend, can define them too.
#pragma once
#include <torch/library.h>

namespace bnfused::ops {

void define(torch::Library& m);

}  // namespace bnfused::ops
