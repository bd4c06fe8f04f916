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

// (address, bytes), or None.
template <class Params>
inline void set_packed(Params& params, const pybind11::object& packed) {
  if (packed.is_none()) return;
  const pybind11::tuple parts = packed.cast<pybind11::tuple>();
  params.packed = pointer<const void>(parts[0].cast<uintptr_t>());
  params.packed_bytes = parts[1].cast<int64_t>();
}

// The parts that autoencoder calls share.
template <class Params>
inline void set_autoencoder(Params& params, int dtype, const pybind11::tuple& weight_enc, const pybind11::object& bias,
                            const pybind11::object& shift, const pybind11::tuple& weight_dec, int64_t k,
                            const pybind11::object& thresholds, const pybind11::object& packed) {
  params.weight_enc = matrix(weight_enc, dtype);
  params.bias = vector(bias, dtype);
  params.shift = vector(shift, dtype);
  params.weight_dec = matrix(weight_dec, dtype);
  params.k = k;
  params.thresholds = vector(thresholds, static_cast<int>(DType::kFloat32));
  set_packed(params, packed);
}

}  // namespace bindings
}  // namespace saerec
