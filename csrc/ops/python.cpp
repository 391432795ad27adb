// See python.h. torch.ops.bnfused.<op> looks up every argument in the schema and boxes it, and boxes the results,
// which takes 1.7 us longer in the forward and 2.1 us in the backward (Zen 5), where batch norm of a small tensor takes
// 20 us each way.
#include "ops/python.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>
#pragma GCC diagnostic pop

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "ops/ops.h"

namespace bnfused::ops {
namespace {

// An argument as Python has it, and what an error calls it.
struct Argument {
  PyObject* value;
  const c10::FunctionSchema& schema;
  size_t index;

  [[noreturn]] void refuse(const char* wanted) const {
    PyErr_Clear();
    C10_THROW_ERROR(TypeError, c10::str(schema.name(), ": expected ", schema.arguments()[index].name(), " to be ",
                                        wanted, ", got ", Py_TYPE(value)->tp_name));
  }
};

template <class T>
T from_python(const Argument&);

template <>
at::Tensor from_python(const Argument& a) {
  if (!THPVariable_Check(a.value)) a.refuse("a tensor");
  return THPVariable_Unpack(a.value);
}

template <>
OptionalTensor from_python(const Argument& a) {
  if (a.value == Py_None) return std::nullopt;
  if (!THPVariable_Check(a.value)) a.refuse("a tensor or None");
  return THPVariable_Unpack(a.value);
}

template <>
double from_python(const Argument& a) {
  const double value = PyFloat_AsDouble(a.value);
  if (value == -1 && PyErr_Occurred()) a.refuse("a number");
  return value;
}

template <>
std::optional<double> from_python(const Argument& a) {
  if (a.value == Py_None) return std::nullopt;
  return from_python<double>(a);
}

template <>
int64_t from_python(const Argument& a) {
  const int64_t value = PyLong_AsLongLong(a.value);
  if (value == -1 && PyErr_Occurred()) a.refuse("an integer");
  return value;
}

template <>
bool from_python(const Argument& a) {
  if (!PyBool_Check(a.value)) a.refuse("a bool");
  return a.value == Py_True;
}

template <size_t kSize>
std::array<bool, kSize> bools_from_python(const Argument& a) {
  const bool listed = PyTuple_Check(a.value) || PyList_Check(a.value);
  if (!listed || PySequence_Fast_GET_SIZE(a.value) != kSize) a.refuse(kSize == 4 ? "4 bools" : "2 bools");
  std::array<bool, kSize> values;
  for (size_t i = 0; i < kSize; ++i) {
    values[i] = from_python<bool>({PySequence_Fast_GET_ITEM(a.value, i), a.schema, a.index});
  }
  return values;
}

template <>
std::array<bool, 4> from_python(const Argument& a) {
  return bools_from_python<4>(a);
}

template <>
std::array<bool, 2> from_python(const Argument& a) {
  return bools_from_python<2>(a);
}

PyObject* to_python(at::Tensor&& t) {
  PyObject* wrapped = THPVariable_Wrap(std::move(t));
  if (!wrapped) throw python_error();
  return wrapped;
}

template <class... Tensors>
PyObject* to_python(std::tuple<Tensors...>&& results) {
  THPObjectPtr tuple(PyTuple_New(sizeof...(Tensors)));
  if (!tuple) throw python_error();
  Py_ssize_t i = 0;
  const auto add = [&](at::Tensor& t) { PyTuple_SET_ITEM(tuple.get(), i++, to_python(std::move(t))); };
  std::apply([&](auto&... t) { (add(t), ...); }, results);
  return tuple.release();
}

class WithoutGil {
 public:
  ~WithoutGil() { PyEval_RestoreThread(state_); }

 private:
  PyThreadState* state_ = PyEval_SaveThread();
};

template <class Signature>
struct Caller;

template <class Result, class... Args>
struct Caller<Result(Args...)> {
  static PyObject* call(const c10::TypedOperatorHandle<Result(Args...)>& op, PyObject* const* args, Py_ssize_t count) {
    TORCH_CHECK_TYPE(count == sizeof...(Args), op.schema().name(), ": expected ", sizeof...(Args), " arguments, got ",
                     count);
    return call(op, args, std::index_sequence_for<Args...>());
  }

 private:
  template <size_t... kIndex>
  static PyObject* call(const c10::TypedOperatorHandle<Result(Args...)>& op, PyObject* const* args,
                        std::index_sequence<kIndex...>) {
    const std::tuple<std::decay_t<Args>...> unpacked{
        from_python<std::decay_t<Args>>({args[kIndex], op.schema(), kIndex})...};
    return to_python([&] {
      const WithoutGil without_gil;
      const at::AutoDispatchBelowAutograd below_autograd;
      return op.call(std::get<kIndex>(unpacked)...);
    }());
  }
};

// The signatures of the ops are the same on every backend. This one names them, and is never called.
struct AnyBackend {
  static void batch_norm_train(const TrainArgs&, c10::Device) {}
  static void batch_norm_apply(const ApplyArgs&, c10::Device) {}
  static void batch_norm_backward(const BackwardArgs&, c10::Device) {}
  static void batch_norm_stats(const MomentsArgs&, c10::Device) {}
  static void batch_norm_gather_stats(const GatherArgs&, c10::Device) {}
  static at::Tensor empty_like(const at::Tensor& x) { return x; }
  static void copy(const at::Tensor&, const at::Tensor&) {}
};

constexpr auto kOps = all_ops<AnyBackend>();

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  const std::string full_name = std::string("bnfused::") + name;
  return c10::Dispatcher::singleton().findSchemaOrThrow(full_name.c_str(), "").typed<Signature>();
}

template <size_t kIndex>
PyObject* function(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  constexpr auto kOp = std::get<kIndex>(kOps);
  using Signature = std::remove_pointer_t<decltype(kOp.function)>;
  static const auto op = find<Signature>(kOp.name);
  return Caller<Signature>::call(op, args, count);
  END_HANDLE_TH_ERRORS
}

template <size_t... kIndex>
PyMethodDef* methods(std::index_sequence<kIndex...>) {
  static PyMethodDef all[] = {
      {std::get<kIndex>(kOps).name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function<kIndex>)),
       METH_FASTCALL, nullptr}...,
      {},
  };
  return all;
}

}  // namespace

void add_functions(PyObject* module) {
  PyMethodDef* all = methods(std::make_index_sequence<std::tuple_size_v<decltype(kOps)>>());
  if (PyModule_AddFunctions(module, all) != 0) throw python_error();
}

}  // namespace bnfused::ops
