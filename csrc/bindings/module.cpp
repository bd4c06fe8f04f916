// Python bindings: addresses, sizes and strides in, GIL released around the kernels. Strides are in elements.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>

#include "../cpu/parallel.h"
#include "saerec/adam.h"
#include "saerec/decode_sparse.h"
#include "saerec/encode_features.h"
#include "saerec/encode_threshold.h"
#include "saerec/isa.h"
#include "saerec/largest_entries.h"
#include "saerec/linear_topk.h"
#include "saerec/packed.h"
#include "saerec/reconstruct.h"
#include "saerec/sparse_gradients.h"
#include "saerec/sparse_training_step.h"
#include "steer.h"
#include "views.h"

namespace py = pybind11;
using saerec::DType;
using saerec::IndexType;
using saerec::bindings::matrix;
using saerec::bindings::pointer;
using saerec::bindings::set_autoencoder;
using saerec::bindings::set_packed;
using saerec::bindings::vector;

namespace {

void pack(int dtype, const py::tuple& weight, const py::object& bias, uintptr_t out, int threads) {
  saerec::PackParams params;
  params.weight = matrix(weight, dtype);
  params.bias = vector(bias, dtype);
  params.out = pointer<void>(out);
  params.threads = threads;
  const py::gil_scoped_release release;
  saerec::pack(params);
}

void linear_topk(int dtype, const py::tuple& x, const py::tuple& weight, const py::object& bias,
                 const py::object& shift, int64_t k, uintptr_t exclude_offsets, uintptr_t exclude_ids,
                 int64_t exclude_count, bool relu, uintptr_t values, uintptr_t indices, int index_type,
                 const py::object& packed, int threads) {
  saerec::LinearTopKParams params;
  params.x = matrix(x, dtype);
  params.weight = matrix(weight, dtype);
  params.bias = vector(bias, dtype);
  params.shift = vector(shift, dtype);
  params.k = k;
  params.exclude_offsets = pointer<const int64_t>(exclude_offsets);
  params.exclude_ids = pointer<const int64_t>(exclude_ids);
  params.exclude_count = exclude_count;
  params.relu = relu;
  params.values = pointer<void>(values);
  params.indices = pointer<void>(indices);
  params.index_type = static_cast<IndexType>(index_type);
  set_packed(params, packed);
  params.threads = threads;
  const py::gil_scoped_release release;
  saerec::linear_topk(params);
}

std::unique_ptr<saerec::SparseRows> encode_threshold(int dtype, const py::tuple& x, const py::tuple& weight,
                                                     const py::object& bias, const py::object& shift,
                                                     const py::tuple& thresholds, const py::object& packed,
                                                     int threads) {
  saerec::EncodeThresholdParams params;
  params.x = matrix(x, dtype);
  params.weight = matrix(weight, dtype);
  params.bias = vector(bias, dtype);
  params.shift = vector(shift, dtype);
  params.thresholds = vector(thresholds, static_cast<int>(DType::kFloat32));
  set_packed(params, packed);
  params.threads = threads;
  const py::gil_scoped_release release;
  return saerec::encode_threshold(params);
}

void encode_features(int dtype, const py::tuple& x, const py::tuple& weight, const py::object& bias,
                     const py::object& shift, const py::tuple& thresholds, uintptr_t features, int64_t n_features,
                     uintptr_t out, int threads) {
  saerec::EncodeFeaturesParams params;
  params.x = matrix(x, dtype);
  params.weight = matrix(weight, dtype);
  params.bias = vector(bias, dtype);
  params.shift = vector(shift, dtype);
  params.thresholds = vector(thresholds, static_cast<int>(DType::kFloat32));
  params.features = pointer<const int64_t>(features);
  params.n_features = n_features;
  params.out = pointer<void>(out);
  params.threads = threads;
  const py::gil_scoped_release release;
  saerec::encode_features(params);
}

void decode_sparse(int dtype, uintptr_t offsets, uintptr_t indices, int index_type, const py::tuple& values,
                   int value_dtype, const py::tuple& weight, const py::object& bias, const py::tuple& out,
                   int threads) {
  saerec::DecodeSparseParams params;
  params.offsets = pointer<const int64_t>(offsets);
  params.indices = {pointer<const void>(indices), static_cast<IndexType>(index_type)};
  params.values = vector(values, value_dtype);
  params.weight = matrix(weight, dtype);
  params.bias = vector(bias, dtype);
  params.out = matrix(out, dtype);
  params.threads = threads;
  const py::gil_scoped_release release;
  saerec::decode_sparse(params);
}

void sparse_dot(int dtype, uintptr_t offsets, uintptr_t indices, int index_type, const py::tuple& rows,
                const py::tuple& weight, uintptr_t out, int out_dtype, int threads) {
  saerec::SparseDotParams params;
  params.offsets = pointer<const int64_t>(offsets);
  params.indices = {pointer<const void>(indices), static_cast<IndexType>(index_type)};
  params.rows = matrix(rows, dtype);
  params.weight = matrix(weight, dtype);
  params.out = pointer<void>(out);
  params.out_dtype = static_cast<DType>(out_dtype);
  params.threads = threads;
  const py::gil_scoped_release release;
  saerec::sparse_dot(params);
}

void sparse_weight_gradient(int dtype, uintptr_t offsets, uintptr_t indices, int index_type,
                            const py::tuple& coefficients, int coefficient_dtype, const py::tuple& rows,
                            const py::object& shift, const py::tuple& out, uintptr_t out_sum, int threads) {
  saerec::SparseWeightGradientParams params;
  params.offsets = pointer<const int64_t>(offsets);
  params.indices = {pointer<const void>(indices), static_cast<IndexType>(index_type)};
  params.coefficients = vector(coefficients, coefficient_dtype);
  params.rows = matrix(rows, dtype);
  params.shift = vector(shift, dtype);
  params.out = matrix(out, dtype);
  params.out_sum = pointer<void>(out_sum);
  params.threads = threads;
  const py::gil_scoped_release release;
  saerec::sparse_weight_gradient(params);
}

void sparse_training_step(int dtype, const py::tuple& x, uintptr_t offsets, uintptr_t indices, int index_type,
                          const py::tuple& values, const py::tuple& weight_enc, const py::tuple& weight_dec,
                          const py::object& bias_dec, float scale, float penalty, const py::tuple& residual,
                          uintptr_t sums, uintptr_t counts, const py::tuple& grad_weight_enc, uintptr_t grad_bias_enc,
                          const py::tuple& grad_weight_dec, uintptr_t grad_bias_dec, int threads) {
  saerec::SparseTrainingStepParams params;
  params.x = matrix(x, dtype);
  params.offsets = pointer<const int64_t>(offsets);
  params.indices = {pointer<const void>(indices), static_cast<IndexType>(index_type)};
  params.values = vector(values, dtype);
  params.weight_enc = matrix(weight_enc, dtype);
  params.weight_dec = matrix(weight_dec, dtype);
  params.bias_dec = vector(bias_dec, dtype);
  params.scale = scale;
  params.penalty = penalty;
  params.residual = matrix(residual, dtype);
  params.sums = pointer<double>(sums);
  params.counts = pointer<int64_t>(counts);
  params.grad_weight_enc = matrix(grad_weight_enc, dtype);
  params.grad_bias_enc = pointer<void>(grad_bias_enc);
  params.grad_weight_dec = matrix(grad_weight_dec, dtype);
  params.grad_bias_dec = pointer<void>(grad_bias_dec);
  params.threads = threads;
  const py::gil_scoped_release release;
  saerec::sparse_training_step(params);
}

void largest_entries(uintptr_t offsets, int64_t rows, int dtype, const py::tuple& values, int64_t count,
                     uintptr_t kept_offsets, uintptr_t kept, int threads) {
  saerec::LargestEntriesParams params;
  params.offsets = pointer<const int64_t>(offsets);
  params.rows = rows;
  params.values = vector(values, dtype);
  params.count = count;
  params.kept_offsets = pointer<int64_t>(kept_offsets);
  params.kept = pointer<int64_t>(kept);
  params.threads = threads;
  const py::gil_scoped_release release;
  saerec::largest_entries(params);
}

void adam_step(uintptr_t parameter, uintptr_t gradient, uintptr_t exp_avg, uintptr_t exp_avg_sq, int64_t rows,
               int64_t cols, double step, double learning_rate, double beta1, double beta2, double epsilon,
               bool unit_rows, int threads) {
  saerec::AdamParams params;
  params.parameter = pointer<float>(parameter);
  params.gradient = pointer<const float>(gradient);
  params.exp_avg = pointer<float>(exp_avg);
  params.exp_avg_sq = pointer<float>(exp_avg_sq);
  params.rows = rows;
  params.cols = cols;
  params.step = step;
  params.learning_rate = learning_rate;
  params.beta1 = beta1;
  params.beta2 = beta2;
  params.epsilon = epsilon;
  params.unit_rows = unit_rows;
  params.threads = threads;
  const py::gil_scoped_release release;
  saerec::adam_step(params);
}

// A reconstruct call with everything but the batch fixed: repeated calls cost little beside the kernel.
class BoundReconstruct {
 public:
  BoundReconstruct(int dtype, const py::tuple& weight_enc, const py::object& bias, const py::object& shift,
                   const py::tuple& weight_dec, int64_t k, const py::object& thresholds, const py::object& packed) {
    set_autoencoder(params_, dtype, weight_enc, bias, shift, weight_dec, k, thresholds, packed);
  }

  // x has any strides, out (rows, d) is contiguous.
  void run(uintptr_t x, int64_t rows, int64_t row_stride, int64_t col_stride, uintptr_t out, int threads) const {
    saerec::ReconstructParams params = params_;
    const int64_t d = params.weight_enc.cols;
    params.x = {pointer<void>(x), params.weight_enc.dtype, rows, d, row_stride, col_stride};
    params.out = {pointer<void>(out), params.weight_enc.dtype, rows, d, d, 1};
    params.threads = threads;
    const py::gil_scoped_release release;
    saerec::reconstruct(params);
  }

 private:
  saerec::ReconstructParams params_;
};

const char* compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "CPU kernels of saerec_fast; saerec_fast.kernels.cpu is the only caller.";
  module.def("packed_size", &saerec::packed_size);
  module.def("pack", &pack);
  module.def("linear_topk", &linear_topk);
  module.def("encode_threshold", &encode_threshold);
  module.def("encode_features", &encode_features);
  module.def("decode_sparse", &decode_sparse);
  module.def("sparse_dot", &sparse_dot);
  module.def("sparse_weight_gradient", &sparse_weight_gradient);
  py::class_<BoundReconstruct>(module, "BoundReconstruct")
      .def(py::init<int, const py::tuple&, const py::object&, const py::object&, const py::tuple&, int64_t,
                    const py::object&, const py::object&>())
      .def("run", &BoundReconstruct::run);
  saerec::bindings::bind_steer(module);
  module.def("sparse_training_step", &sparse_training_step);
  module.def("largest_entries", &largest_entries);
  module.def("adam_step", &adam_step);
  py::class_<saerec::SparseRows>(module, "SparseRows")
      .def_property_readonly("n_entries", &saerec::SparseRows::n_entries)
      .def("copy_to",
           [](const saerec::SparseRows& rows, uintptr_t offsets, uintptr_t indices, uintptr_t values, int dtype) {
             const py::gil_scoped_release release;
             rows.copy_to(pointer<int64_t>(offsets), pointer<int32_t>(indices), pointer<void>(values),
                          static_cast<DType>(dtype));
           });
  module.def("compiled_isas", &saerec::compiled_isas);
  module.def("supported_isas", &saerec::supported_isas);
  module.def("active_isa", &saerec::active_isa);
  module.def("set_isa", &saerec::set_isa, py::arg("name"));
  module.def("set_serial", &saerec::set_serial, py::arg("serial"));
  module.def("is_serial", &saerec::is_serial);
  module.def("compiler", &compiler);
#if defined(_OPENMP)
  module.attr("openmp") = true;
#else
  module.attr("openmp") = false;
#endif
}
