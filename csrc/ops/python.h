// The ops as functions of Python.
#pragma once
#include <Python.h>

namespace bnfused::ops {

// Adds one function for each op to a module. The function takes the op's arguments by position, calls the dispatcher
// below autograd, and returns the op's results.
void add_functions(PyObject* module);

}  // namespace bnfused::ops
