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
#include <tuple>
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
struct Op;

template <class Result, class... Args>
struct Op<Result(Args...)> {
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

template <const char* kName, class Signature>
PyObject* function(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(kName, "").typed<Signature>();
  return Op<Signature>::call(op, args, count);
  END_HANDLE_TH_ERRORS
}

// The name of an op, of which the part after "bnfused::" is that of the function. No backend is asked for: a signature
// is the same for all of them.
template <const char* kName, class Signature>
PyMethodDef method() {
  constexpr size_t kNamespace = sizeof("bnfused::") - 1;
  return {kName + kNamespace, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function<kName, Signature>)),
          METH_FASTCALL, nullptr};
}

constexpr char kTrain[] = "bnfused::batch_norm_train";
constexpr char kFrozen[] = "bnfused::batch_norm_frozen";
constexpr char kEval[] = "bnfused::batch_norm_eval";
constexpr char kBackward[] = "bnfused::batch_norm_backward";
constexpr char kStats[] = "bnfused::batch_norm_stats";
constexpr char kGatherStats[] = "bnfused::batch_norm_gather_stats";
constexpr char kApply[] = "bnfused::batch_norm_apply";
constexpr char kBackwardReduce[] = "bnfused::batch_norm_backward_reduce";
constexpr char kBackwardApply[] = "bnfused::batch_norm_backward_apply";

}  // namespace

void add_functions(PyObject* module) {
  static PyMethodDef methods[] = {
      method<kTrain, decltype(batch_norm_train<void>)>(),
      method<kFrozen, decltype(batch_norm_frozen<void>)>(),
      method<kEval, decltype(batch_norm_eval<void>)>(),
      method<kBackward, decltype(batch_norm_backward<void>)>(),
      method<kStats, decltype(batch_norm_stats<void>)>(),
      method<kGatherStats, decltype(batch_norm_gather_stats<void>)>(),
      method<kApply, decltype(batch_norm_apply<void>)>(),
      method<kBackwardReduce, decltype(batch_norm_backward_reduce<void>)>(),
      method<kBackwardApply, decltype(batch_norm_backward_apply<void>)>(),
      {},
  };
  if (PyModule_AddFunctions(module, methods) != 0) throw python_error();
}

}  // namespace bnfused::ops
