// Reading tensors where microseconds count and the caches are cold. Torch's C exchange interface for DLPack tells all
// of a tensor in one call, and is a plain struct of functions, so that nothing is linked against torch; a torch that
// lacks it (before 2.10) is asked attribute by attribute.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>

#include "python.h"
#include "saerec/views.h"

namespace saerec {
namespace bindings {

// As DLPack 1 lays them out (dmlc.github.io/dlpack); only what is read here has a name of its own.
namespace dlpack {

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
constexpr uint8_t kFloat = 2, kBfloat = 4, kBool = 6;

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};
constexpr int32_t kCpu = 1;

struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* previous;
  void *allocate, *to_managed, *from_managed;
  int (*read)(void* object, Tensor* out);  // non-zero: a Python error is set
  void* current_stream;
};
constexpr uint32_t kMajor = 1;
constexpr const char* kCapsule = "dlpack_exchange_api";

}  // namespace dlpack

// An element type, by both of its names.
struct ElementType {
  pybind11::object torch;
  dlpack::DataType dlpack;
};

inline dlpack::DataType dlpack_type(DType dtype) {
  if (dtype == DType::kFloat32) return {dlpack::kFloat, 32, 1};
  return {dtype == DType::kBFloat16 ? dlpack::kBfloat : dlpack::kFloat, 16, 1};
}

constexpr int kMaxDimensions = 3;

struct TensorView {
  void* data = nullptr;
  int dimensions = 0;
  int64_t shape[kMaxDimensions] = {};
};

class TensorReader {
 public:
  // exchange: torch.Tensor's capsule with the C interface, or None.
  TensorReader(pybind11::object type, const pybind11::object& exchange) : type_(std::move(type)) {
    if (exchange.is_none()) return;
    const auto* api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(exchange.ptr(), dlpack::kCapsule));
    if (api == nullptr) PyErr_Clear();  // not what it is taken for
    if (api != nullptr && api->major == dlpack::kMajor && api->read != nullptr) exchange_ = api;
  }

  bool is_tensor(PyObject* value) const { return PyObject_TypeCheck(value, type()) != 0; }
  // No subclass, which may be a stand-in without memory.
  bool is_plain(PyObject* value) const { return Py_TYPE(value) == type(); }

  // Whether a tensor is contiguous, of that element type, of 1 to 3 dimensions, and where the kernel can read it; then
  // what it is.
  bool read(const pybind11::object& tensor, const ElementType& element, TensorView& view) const {
    if (!(exchange_ != nullptr ? exchange(tensor, element, view) : ask(tensor, element, view))) return false;
    int64_t count = 1;
    for (int i = 0; i < view.dimensions; ++i) count *= view.shape[i];
    // No memory for something: a stand-in, such as torch makes for tensors that are all zero.
    return count == 0 || view.data != nullptr;
  }

  uintptr_t address_of(const pybind11::object& tensor) const {
    dlpack::Tensor found;
    if (exchange_ != nullptr) {
      if (exchange_->read(tensor.ptr(), &found) == 0) return reinterpret_cast<uintptr_t>(data_of(found));
      PyErr_Clear();
    }
    return static_cast<uintptr_t>(integer(data_ptr_.of(tensor)));
  }

  // Whether it holds the negative of what it stands for.
  bool is_negative(const pybind11::object& tensor) const { return !is_neg_.of(tensor).is(pybind11::handle(Py_False)); }

  // Counts what was written to it.
  int64_t version_of(const pybind11::object& tensor) const { return integer(version_.of(tensor)); }

 private:
  // An attribute of tensors, or what a method without arguments returns. Looked up in the type once: where that finds
  // what C implements, it is called as it is.
  class Attribute {
   public:
    Attribute(const pybind11::object& tensor_type, const char* name) : name_(interned(name)) {
      descriptor_ = checked(PyObject_GetAttr(tensor_type.ptr(), name_.ptr()));
      is_method_ = PyCallable_Check(descriptor_.ptr()) != 0;
      if (Py_TYPE(descriptor_.ptr()) == &PyGetSetDescr_Type) {
        attribute_ = reinterpret_cast<PyGetSetDescrObject*>(descriptor_.ptr())->d_getset;
      } else if (Py_TYPE(descriptor_.ptr()) == &PyMethodDescr_Type) {
        PyMethodDef* method = reinterpret_cast<PyMethodDescrObject*>(descriptor_.ptr())->d_method;
        if (method->ml_flags == METH_NOARGS) method_ = method->ml_meth;
      }
    }

    pybind11::object of(const pybind11::object& tensor) const {
      if (attribute_ != nullptr) return checked(attribute_->get(tensor.ptr(), attribute_->closure));
      if (method_ != nullptr) return checked(method_(tensor.ptr(), nullptr));
      return checked(is_method_ ? PyObject_CallMethodNoArgs(tensor.ptr(), name_.ptr())
                                : PyObject_GetAttr(tensor.ptr(), name_.ptr()));
    }

   private:
    pybind11::str name_;
    pybind11::object descriptor_;
    bool is_method_;
    PyGetSetDef* attribute_ = nullptr;
    PyCFunction method_ = nullptr;
  };

  PyTypeObject* type() const { return reinterpret_cast<PyTypeObject*>(type_.ptr()); }

  static void* data_of(const dlpack::Tensor& tensor) { return static_cast<char*>(tensor.data) + tensor.byte_offset; }

  bool exchange(const pybind11::object& tensor, const ElementType& element, TensorView& view) const {
    dlpack::Tensor found;
    if (exchange_->read(tensor.ptr(), &found) != 0) {
      PyErr_Clear();
      return false;
    }
    const dlpack::DataType& dtype = found.dtype;
    if (found.device_type != dlpack::kCpu || found.ndim < 1 || found.ndim > kMaxDimensions ||
        dtype.code != element.dlpack.code || dtype.bits != element.dlpack.bits || dtype.lanes != 1) {
      return false;
    }
    view.data = data_of(found);
    view.dimensions = found.ndim;
    int64_t stride = 1;
    bool contiguous = true;
    for (int i = found.ndim - 1; i >= 0; --i) {
      view.shape[i] = found.shape[i];
      contiguous = contiguous && (found.shape[i] == 1 || found.strides[i] == stride);
      stride *= found.shape[i];
    }
    return contiguous || stride == 0;  // where there is nothing, any strides will do
  }

  bool ask(const pybind11::object& tensor, const ElementType& element, TensorView& view) const {
    const pybind11::handle yes = Py_True;
    if (!dtype_.of(tensor).is(element.torch) || !is_cpu_.of(tensor).is(yes) || !is_contiguous_.of(tensor).is(yes)) {
      return false;
    }
    const pybind11::tuple shape = shape_.of(tensor);
    if (shape.empty() || shape.size() > kMaxDimensions) return false;
    view.dimensions = static_cast<int>(shape.size());
    for (int i = 0; i < view.dimensions; ++i) view.shape[i] = integer(shape[static_cast<std::size_t>(i)]);
    view.data = reinterpret_cast<void*>(address_of(tensor));
    return true;
  }

  pybind11::object type_;
  const dlpack::ExchangeApi* exchange_ = nullptr;
  Attribute data_ptr_{type_, "data_ptr"}, version_{type_, "_version"}, shape_{type_, "shape"}, dtype_{type_, "dtype"},
      is_cpu_{type_, "is_cpu"}, is_contiguous_{type_, "is_contiguous"}, is_neg_{type_, "is_neg"};
};

}  // namespace bindings
}  // namespace saerec
