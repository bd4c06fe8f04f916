// Python bindings: addresses, sizes and strides in, GIL released around the kernels. Strides are in elements.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

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
#include "saerec/steer.h"
#include "views.h"

namespace py = pybind11;
using saerec::DType;
using saerec::IndexType;
using saerec::bindings::matrix;
using saerec::bindings::pointer;
using saerec::bindings::vector;

namespace {

// (address, bytes), or None.
template <class Params>
void set_packed(Params& params, const py::object& packed) {
  if (packed.is_none()) return;
  const py::tuple parts = packed.cast<py::tuple>();
  params.packed = pointer<const void>(parts[0].cast<uintptr_t>());
  params.packed_bytes = parts[1].cast<int64_t>();
}

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

// The parts that autoencoder calls share.
template <class Params>
void set_autoencoder(Params& params, int dtype, const py::tuple& weight_enc, const py::object& bias,
                     const py::object& shift, const py::tuple& weight_dec, int64_t k, const py::object& thresholds,
                     const py::object& packed) {
  params.weight_enc = matrix(weight_enc, dtype);
  params.bias = vector(bias, dtype);
  params.shift = vector(shift, dtype);
  params.weight_dec = matrix(weight_dec, dtype);
  params.k = k;
  params.thresholds = vector(thresholds, static_cast<int>(DType::kFloat32));
  set_packed(params, packed);
}

void steer(int dtype, const py::tuple& x, const py::tuple& weight_enc, const py::object& bias, const py::object& shift,
           const py::tuple& weight_dec, int64_t k, const py::object& thresholds, bool reconstruct, int64_t n_edits,
           uintptr_t edit_features, uintptr_t edit_ops, uintptr_t edit_values, int64_t edit_values_row_stride,
           uintptr_t row_mask, const py::tuple& out, const py::object& packed, int threads) {
  saerec::SteerPlan plan;
  plan.n_edits = n_edits;
  plan.features = pointer<const int64_t>(edit_features);
  plan.ops = pointer<const int64_t>(edit_ops);
  plan.values = pointer<const float>(edit_values);
  plan.values_stride = edit_values_row_stride;
  plan.reconstruct = reconstruct;
  saerec::SteerParams params;
  set_autoencoder(params, dtype, weight_enc, bias, shift, weight_dec, k, thresholds, packed);
  params.x = matrix(x, dtype);
  params.plans = &plan;
  params.n_plans = 1;
  params.valid = pointer<const bool>(row_mask);
  params.out = matrix(out, dtype);
  params.threads = threads;
  const py::gil_scoped_release release;
  saerec::steer(params);
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

// A steering plan as the kernel reads it.
class SteerProgram {
 public:
  // directions: float32, n_directions rows of the width of the hidden states, copied.
  SteerProgram(std::vector<int64_t> features, std::vector<int64_t> ops, std::vector<float> values, bool reconstruct,
               int positions, float max_relative_norm, bool clip, const std::vector<float>& directions)
      : features_(std::move(features)), ops_(std::move(ops)), values_(std::move(values)), directions_(directions) {
    plan_.n_edits = static_cast<int64_t>(features_.size());
    plan_.features = features_.data();
    plan_.ops = ops_.data();
    plan_.values = values_.data();
    plan_.directions = directions_.data();
    plan_.reconstruct = reconstruct;
    plan_.positions = static_cast<saerec::Positions>(positions);
    plan_.max_relative_norm = max_relative_norm;
    plan_.clip = clip;
  }
  SteerProgram(const SteerProgram&) = delete;
  SteerProgram& operator=(const SteerProgram&) = delete;

  const saerec::SteerPlan& plan() const { return plan_; }

 private:
  std::vector<int64_t> features_, ops_;
  std::vector<float> values_, directions_;
  saerec::SteerPlan plan_;
};

// A steer call with the autoencoder fixed.
class BoundSteer {
 public:
  BoundSteer(int dtype, const py::tuple& weight_enc, const py::object& bias, const py::object& shift,
             const py::tuple& weight_dec, int64_t k, const py::object& thresholds, const py::object& packed) {
    set_autoencoder(params_, dtype, weight_enc, bias, shift, weight_dec, k, thresholds, packed);
  }

  // One plan for all sequences. values (float32) replace the plan's where they are not 0: (n_edits), or one row a
  // sequence at values_stride. x has any strides, out (rows, d) is contiguous.
  float run(uintptr_t x, int64_t rows, int64_t row_stride, int64_t col_stride, int64_t length, uintptr_t out,
            const SteerProgram& program, uintptr_t values, int64_t values_stride, uintptr_t valid, int threads) const {
    saerec::SteerPlan plan = program.plan();
    if (values != 0) {
      plan.values = pointer<const float>(values);
      plan.values_stride = values_stride;
    }
    return steer(x, rows, row_stride, col_stride, length, out, &plan, 1, nullptr, valid, threads);
  }

  // A plan for each sequence, None for none.
  float run_each(uintptr_t x, int64_t rows, int64_t row_stride, int64_t col_stride, int64_t length, uintptr_t out,
                 const std::vector<const SteerProgram*>& programs, uintptr_t valid, int threads) const {
    std::vector<saerec::SteerPlan> plans;
    std::vector<int32_t> sequence_plans;
    std::unordered_map<const SteerProgram*, int32_t> places;
    for (const SteerProgram* program : programs) {
      if (program == nullptr) {
        sequence_plans.push_back(-1);
        continue;
      }
      const auto [place, is_new] = places.emplace(program, static_cast<int32_t>(plans.size()));
      if (is_new) plans.push_back(program->plan());
      sequence_plans.push_back(place->second);
    }
    return steer(x, rows, row_stride, col_stride, length, out, plans.data(), static_cast<int64_t>(plans.size()),
                 sequence_plans.data(), valid, threads);
  }

 private:
  float steer(uintptr_t x, int64_t rows, int64_t row_stride, int64_t col_stride, int64_t length, uintptr_t out,
              const saerec::SteerPlan* plans, int64_t n_plans, const int32_t* sequence_plans, uintptr_t valid,
              int threads) const {
    saerec::SteerParams params = params_;
    const int64_t d = params.weight_enc.cols;
    params.x = {pointer<void>(x), params.weight_enc.dtype, rows, d, row_stride, col_stride};
    params.out = {pointer<void>(out), params.weight_enc.dtype, rows, d, d, 1};
    params.length = length;
    params.plans = plans;
    params.n_plans = n_plans;
    params.sequence_plans = sequence_plans;
    params.valid = pointer<const bool>(valid);
    params.threads = threads;
    const py::gil_scoped_release release;
    return saerec::steer(params);
  }

  saerec::SteerParams params_;
};

// Steering of a module's output where nothing is out of the ordinary, in one call. Between two forward passes of a
// model the caches forget interpreted code, which then costs more than the kernel; so this reads the tensors through
// the Python C API, and allocates nothing but the output.
class PlainSteer {
 public:
  // bound, program and strengths (None: the plan's values; else a float32 tensor (n_edits), contiguous) as
  // BoundSteer.run takes them. seen: (dict, name, value) for everything that they were made from; tensors among the
  // values may not have been written to either. torch: the functions empty_like, is_grad_enabled and get_num_threads. x
  // has to be a plain torch.Tensor, tensor_type, of dtype x_dtype, a mask one of dtype mask_dtype.
  PlainSteer(py::object bound, py::object program, py::object strengths, const py::list& seen, py::object tensor_type,
             py::object x_dtype, py::object mask_dtype, int64_t width, const py::tuple& torch)
      : bound_(std::move(bound)),
        program_(std::move(program)),
        strengths_(std::move(strengths)),
        tensor_type_(std::move(tensor_type)),
        x_dtype_(std::move(x_dtype)),
        mask_dtype_(std::move(mask_dtype)),
        width_(width),
        empty_like_(torch[0]),
        is_grad_enabled_(torch[1]),
        get_num_threads_(torch[2]) {
    if (!strengths_.is_none()) {
      strengths_dtype_ = read(strengths_, dtype_);
      n_strengths_ = number(called(strengths_, numel_));
    }
    for (const py::handle entry : seen) {
      const py::tuple parts = entry.cast<py::tuple>();
      Seen one = {parts[0], parts[1], parts[2], is_tensor(parts[2].ptr()), 0, 0};
      if (one.is_tensor) {
        one.address = address_of(one.value);
        one.version = number(read(one.value, version_));
      }
      seen_.push_back(one);
    }
  }

  // The steered copy of x, None where anything is not as it was, or not plain; all of it is then for the caller to do.
  py::object run(const py::object& x, const py::object& mask) const {
    try {
      if (!is_plain(x, x_dtype_) || is_grad_enabled_().is(py::handle(Py_True)) || !is_current()) return py::none();
      // The caller's own tensor may have been given other memory, as a module's move to another dtype does.
      if (!strengths_.is_none() &&
          (!is_readable(strengths_, strengths_dtype_) || number(called(strengths_, numel_)) != n_strengths_)) {
        return py::none();
      }
      const py::tuple shape = read(x, shape_);
      const std::size_t dimensions = shape.size();
      if (dimensions < 2 || dimensions > 3 || number(shape[dimensions - 1]) != width_) return py::none();
      const auto& program = program_.cast<const SteerProgram&>();
      const int64_t sequences = number(shape[0]), length = dimensions == 3 ? number(shape[1]) : 1;
      if (dimensions == 2 && program.plan().positions == saerec::Positions::kLast) return py::none();
      uintptr_t valid = 0;
      if (!mask.is_none()) {
        if (!is_plain(mask, mask_dtype_)) return py::none();
        const py::tuple mask_shape = read(mask, shape_);
        if (mask_shape.size() + 1 != dimensions || number(mask_shape[0]) != sequences) return py::none();
        if (dimensions == 3 && number(mask_shape[1]) != length) return py::none();
        valid = address_of(mask);
      }
      py::object out = empty_like_(x);
      const uintptr_t from = address_of(x), to = address_of(out);
      const int threads = static_cast<int>(number(get_num_threads_()));
      std::vector<float> values;
      if (!strengths_.is_none()) {
        const auto* strengths = pointer<const float>(address_of(strengths_));
        // Whoever writes to them pauses this first, and cannot do so before the interpreter is released below.
        if (paused_) return py::none();
        values.assign(strengths, strengths + n_strengths_);
      }
      bound_.cast<const BoundSteer&>().run(from, sequences * length, width_, 1, length, to, program,
                                           reinterpret_cast<uintptr_t>(values.data()), 0, valid, threads);
      return out;
    } catch (py::error_already_set& error) {
      if (!error.matches(PyExc_RuntimeError)) throw;
      return py::none();  // a tensor that does not tell, as those of function transforms
    }
  }

  // What it refers to may refer to it in turn: an autoencoder that holds the handle on its own states, say.
  int visit(visitproc visit, void* arg) const {
    for (const py::object* held : {&bound_, &program_, &strengths_}) Py_VISIT(held->ptr());
    for (const Seen& one : seen_) {
      Py_VISIT(one.holder.ptr());
      Py_VISIT(one.value.ptr());
    }
    return 0;
  }

  // Called where nothing but a cycle is left.
  void clear() {
    cleared_ = true;
    std::vector<Seen>().swap(seen_);
    strengths_ = py::none();
  }

  // While strengths are written to, run returns None.
  void pause(bool paused) { paused_ = paused; }

  // Whether nothing was replaced or written to.
  bool is_current() const {
    if (cleared_) return false;
    for (const Seen& one : seen_) {
      if (PyDict_GetItemWithError(one.holder.ptr(), one.name.ptr()) != one.value.ptr()) return false;
      if (!one.is_tensor) continue;
      if (number(read(one.value, version_)) != one.version || address_of(one.value) != one.address) return false;
    }
    return true;
  }

 private:
  struct Seen {
    py::object holder, name, value;
    bool is_tensor;
    uintptr_t address;
    int64_t version;
  };

  static int64_t number(const py::object& value) {
    const int64_t result = PyLong_AsLongLong(value.ptr());
    if (result == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
    return result;
  }

  static py::object read(const py::object& value, const py::str& attribute) {
    return py::reinterpret_steal<py::object>(check(PyObject_GetAttr(value.ptr(), attribute.ptr())));
  }

  static py::object called(const py::object& value, const py::str& method) {
    return py::reinterpret_steal<py::object>(check(PyObject_CallMethodNoArgs(value.ptr(), method.ptr())));
  }

  static PyObject* check(PyObject* result) {
    if (result == nullptr) throw py::error_already_set();
    return result;
  }

  uintptr_t address_of(const py::object& tensor) const {
    return static_cast<uintptr_t>(number(called(tensor, data_ptr_)));
  }

  bool is_tensor(PyObject* value) const { return PyObject_TypeCheck(value, type_of(tensor_type_)) != 0; }

  static PyTypeObject* type_of(const py::object& type) { return reinterpret_cast<PyTypeObject*>(type.ptr()); }

  // No subclass, which may be a stand-in without memory.
  bool is_plain(const py::object& tensor, const py::object& dtype) const {
    return Py_TYPE(tensor.ptr()) == type_of(tensor_type_) && is_readable(tensor, dtype);
  }

  // Contiguous, where the kernel can read it, and holding what it stands for rather than its negative.
  bool is_readable(const py::object& tensor, const py::object& dtype) const {
    return read(tensor, dtype_).is(dtype) && read(tensor, is_cpu_).is(py::handle(Py_True)) &&
           called(tensor, is_contiguous_).is(py::handle(Py_True)) && called(tensor, is_neg_).is(py::handle(Py_False));
  }

  py::object bound_, program_, strengths_, tensor_type_, x_dtype_, mask_dtype_;
  py::object strengths_dtype_;
  int64_t width_, n_strengths_ = 0;
  bool paused_ = false, cleared_ = false;
  py::object empty_like_, is_grad_enabled_, get_num_threads_;
  std::vector<Seen> seen_;
  py::str data_ptr_ = interned("data_ptr"), version_ = interned("_version"), shape_ = interned("shape"),
          dtype_ = interned("dtype"), is_cpu_ = interned("is_cpu"), is_contiguous_ = interned("is_contiguous"),
          is_neg_ = interned("is_neg"), numel_ = interned("numel");

  static py::str interned(const char* name) {
    return py::reinterpret_steal<py::str>(check(PyUnicode_InternFromString(name)));
  }
};

// Makes the cycle collector see what a PlainSteer holds.
void collect_cycles(PyHeapTypeObject* heap_type) {
  PyTypeObject* type = &heap_type->ht_type;
  type->tp_flags |= Py_TPFLAGS_HAVE_GC;
  type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    // Not yet constructed, it holds nothing.
    return py::detail::is_holder_constructed(self) ? py::cast<const PlainSteer&>(py::handle(self)).visit(visit, arg)
                                                   : 0;
  };
  type->tp_clear = [](PyObject* self) {
    if (py::detail::is_holder_constructed(self)) py::cast<PlainSteer&>(py::handle(self)).clear();
    return 0;
  };
}

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
  module.def("steer", &steer);
  py::class_<SteerProgram>(module, "SteerProgram")
      .def(py::init<std::vector<int64_t>, std::vector<int64_t>, std::vector<float>, bool, int, float, bool,
                    const std::vector<float>&>());
  py::class_<BoundSteer>(module, "BoundSteer")
      .def(py::init<int, const py::tuple&, const py::object&, const py::object&, const py::tuple&, int64_t,
                    const py::object&, const py::object&>())
      .def("run", &BoundSteer::run)
      .def("run_each", &BoundSteer::run_each);
  py::class_<PlainSteer>(module, "PlainSteer", py::custom_type_setup(&collect_cycles))
      .def(py::init<py::object, py::object, py::object, const py::list&, py::object, py::object, py::object, int64_t,
                    const py::tuple&>())
      .def("run", &PlainSteer::run)
      .def("pause", &PlainSteer::pause)
      .def("is_current", &PlainSteer::is_current);
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
