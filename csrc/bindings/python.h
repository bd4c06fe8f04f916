// Python's C API with exceptions.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace saerec {
namespace bindings {

inline pybind11::object checked(PyObject* result) {
  if (result == nullptr) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(result);
}

inline int64_t integer(const pybind11::object& value) {
  const int64_t result = PyLong_AsLongLong(value.ptr());
  if (result == -1 && PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
  return result;
}

inline pybind11::str interned(const char* name) {
  return pybind11::reinterpret_steal<pybind11::str>(checked(PyUnicode_InternFromString(name)).release());
}

}  // namespace bindings
}  // namespace saerec
