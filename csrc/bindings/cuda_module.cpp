// Python bindings of the CUDA kernels: addresses, sizes and strides in, GIL released around the launch. A module of its
// own, so that everything else works where it was not built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "saerec/cuda_steer.h"
#include "views.h"

namespace py = pybind11;
using saerec::DType;
using saerec::bindings::matrix;
using saerec::bindings::pointer;
using saerec::bindings::vector;

namespace {

class SteerCall {
 public:
  SteerCall(int device, int dtype, const py::tuple& x, const py::tuple& weight_enc, const py::object& bias,
            const py::object& shift, const py::tuple& weight_dec, int64_t k, const py::object& thresholds,
            bool reconstruct, std::vector<int64_t> edit_features, std::vector<int64_t> edit_ops)
      : device_(saerec::cuda_device(device)), edit_features_(std::move(edit_features)), edit_ops_(std::move(edit_ops)) {
    params_.x = matrix(x, dtype);
    params_.weight_enc = matrix(weight_enc, dtype);
    params_.bias = vector(bias, dtype);
    params_.shift = vector(shift, dtype);
    params_.weight_dec = matrix(weight_dec, dtype);
    params_.k = k;
    params_.thresholds = vector(thresholds, static_cast<int>(DType::kFloat32));
    params_.reconstruct = reconstruct;
    params_.n_edits = static_cast<int64_t>(edit_features_.size());
    params_.edit_features = edit_features_.data();
    params_.edit_ops = edit_ops_.data();
  }
  // The params point into this object.
  SteerCall(const SteerCall&) = delete;
  SteerCall& operator=(const SteerCall&) = delete;

  std::string problem() const { return saerec::cuda_steer_problem(params_, device_); }
  int64_t workspace_bytes() const { return saerec::cuda_steer_workspace(params_, device_); }

  void launch(uintptr_t edit_values, int64_t edit_values_row_stride, uintptr_t row_mask, const py::tuple& out,
              uintptr_t workspace, int64_t workspace_bytes, uintptr_t stream) const {
    saerec::CudaSteerParams params = params_;
    params.edit_values = pointer<const float>(edit_values);
    params.edit_values_row_stride = edit_values_row_stride;
    params.row_mask = pointer<const bool>(row_mask);
    params.out = matrix(out, static_cast<int>(params.x.dtype));
    const py::gil_scoped_release release;
    saerec::cuda_steer(params, device_, pointer<void>(workspace), workspace_bytes, pointer<void>(stream));
  }

 private:
  saerec::CudaDevice device_;
  std::vector<int64_t> edit_features_, edit_ops_;
  saerec::CudaSteerParams params_;
};

// (number of devices, the reason where the driver cannot say)
std::pair<int, std::string> device_count() {
  std::string reason;
  const int count = saerec::cuda_device_count(&reason);
  return {count, reason};
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA kernels of saerec_fast; saerec_fast.kernels.cuda is the only caller.";
  module.def("device_count", &device_count);
  py::class_<SteerCall>(module, "SteerCall")
      .def(py::init<int, int, const py::tuple&, const py::tuple&, const py::object&, const py::object&,
                    const py::tuple&, int64_t, const py::object&, bool, std::vector<int64_t>, std::vector<int64_t>>())
      .def("problem", &SteerCall::problem)
      .def("workspace_bytes", &SteerCall::workspace_bytes)
      .def("launch", &SteerCall::launch);
}
