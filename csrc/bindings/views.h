// From what Python hands over to the views of saerec/views.h.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "saerec/views.h"

namespace saerec {
namespace bindings {

template <class T>
inline T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// (address, rows, cols, row stride, column stride); all tensors of a call share one dtype.
inline Matrix matrix(const pybind11::tuple& view, int dtype) {
  Matrix m;
  m.data = pointer<void>(view[0].cast<uintptr_t>());
  m.dtype = static_cast<DType>(dtype);
  m.rows = view[1].cast<int64_t>();
  m.cols = view[2].cast<int64_t>();
  m.row_stride = view[3].cast<int64_t>();
  m.col_stride = view[4].cast<int64_t>();
  return m;
}

// (address, size, stride), or None.
inline Vector vector(const pybind11::object& view, int dtype) {
  Vector v;
  if (view.is_none()) return v;
  const pybind11::tuple parts = view.cast<pybind11::tuple>();
  v.data = pointer<void>(parts[0].cast<uintptr_t>());
  v.dtype = static_cast<DType>(dtype);
  v.size = parts[1].cast<int64_t>();
  v.stride = parts[2].cast<int64_t>();
  return v;
}

}  // namespace bindings
}  // namespace saerec
