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

py::object checked(PyObject* result) {
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

int64_t integer(const py::object& value) {
  const int64_t result = PyLong_AsLongLong(value.ptr());
  if (result == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return result;
}

py::str interned(const char* name) {
  return py::reinterpret_steal<py::str>(checked(PyUnicode_InternFromString(name)).release());
}

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
  // edits: of the plan, those of direction_type being directions. ops: their names, in the order of EditOp. whole: the
  // kernel does all of it; no mask of positions and no limit to report is left for the caller.
  SteerProgram(const py::tuple& edits, const py::object& direction_type, const py::tuple& ops, bool reconstruct,
               int positions, float max_relative_norm, bool clip, bool whole)
      : whole_(whole), adds_(!reconstruct) {
    const py::str feature = interned("feature"), op = interned("op"), value = interned("value");
    int64_t n_directions = 0;
    for (const py::handle edit : edits) {
      values_.push_back(static_cast<float>(PyFloat_AsDouble(checked(PyObject_GetAttr(edit.ptr(), value.ptr())).ptr())));
      if (py::isinstance(edit, direction_type)) {
        const auto direction = edit.attr("vector").attr("tolist")().cast<std::vector<float>>();
        width_ = static_cast<int64_t>(direction.size());
        directions_.insert(directions_.end(), direction.begin(), direction.end());
        features_.push_back(-1 - n_directions++);
        ops_.push_back(static_cast<int64_t>(saerec::EditOp::kAdd));
        continue;
      }
      features_.push_back(integer(checked(PyObject_GetAttr(edit.ptr(), feature.ptr()))));
      ops_.push_back(PySequence_Index(ops.ptr(), checked(PyObject_GetAttr(edit.ptr(), op.ptr())).ptr()));
      adds_ = adds_ && ops_.back() == static_cast<int64_t>(saerec::EditOp::kAdd);
    }
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();
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
  // Of its directions, 0 where there are none.
  int64_t width() const { return width_; }
  bool whole() const { return whole_; }
  // Whether activations do not matter.
  bool adds() const { return adds_; }

 private:
  std::vector<int64_t> features_, ops_;
  std::vector<float> values_, directions_;
  int64_t width_ = 0;
  bool whole_, adds_;
  saerec::SteerPlan plan_;
};

// What a batch is steered by: a plan for all of its sequences, or one for each.
class SteerPlans {
 public:
  // programs: one, or a list of them with None for none. strengths: of the one, a float32 tensor (n_edits) or
  // (sequences, n_edits) whose values replace the program's and are read anew in every pass; or None.
  SteerPlans(py::object programs, py::object strengths)
      : programs_(std::move(programs)), strengths_(std::move(strengths)) {
    if (!py::isinstance<py::list>(programs_)) {
      add(programs_.cast<const SteerProgram&>());
      if (!strengths_.is_none()) {
        shape_ = strengths_.attr("shape");
        const std::size_t dimensions = shape_.size();
        if (dimensions == 2) strengths_rows_ = shape_[0].cast<int64_t>();
        whole_ = whole_ && (dimensions == 1 || dimensions == 2) &&
                 shape_[dimensions - 1].cast<int64_t>() == plans_[0].n_edits;
      }
      return;
    }
    std::unordered_map<PyObject*, int32_t> places;
    for (const py::handle program : py::reinterpret_borrow<py::list>(programs_)) {
      if (program.is_none()) {
        sequence_plans_.push_back(-1);
        continue;
      }
      const auto [place, is_new] = places.emplace(program.ptr(), static_cast<int32_t>(plans_.size()));
      if (is_new) add(program.cast<const SteerProgram&>());
      sequence_plans_.push_back(place->second);
    }
    each_ = true;
  }

  // While strengths are written to, PlainSteer.run returns None.
  void pause(bool paused) { paused_ = paused; }

  // Whether the kernel does all of it for sequences of hidden states of this width.
  bool fits(int64_t sequences, int64_t width, bool has_length) const {
    if (!whole_ || (has_last_ && !has_length) || (width_ != 0 && width_ != width)) return false;
    if (strengths_rows_ >= 0 && strengths_rows_ != sequences) return false;
    return !each_ || static_cast<int64_t>(sequence_plans_.size()) == sequences;
  }

  const std::vector<saerec::SteerPlan>& plans() const { return plans_; }
  // Plan of each sequence, null where all have the first.
  const int32_t* sequence_plans() const { return each_ ? sequence_plans_.data() : nullptr; }
  const py::object& strengths() const { return strengths_; }
  const py::tuple& strengths_shape() const { return shape_; }
  int64_t n_strengths() const { return plans_[0].n_edits * (strengths_rows_ >= 0 ? strengths_rows_ : 1); }
  int64_t strengths_stride() const { return strengths_rows_ >= 0 ? plans_[0].n_edits : 0; }
  bool paused() const { return paused_; }
  bool adds() const { return adds_; }

  // Strengths may refer to what holds the plans.
  int visit(visitproc visit, void* arg) const {
    Py_VISIT(programs_.ptr());
    Py_VISIT(strengths_.ptr());
    return 0;
  }
  void clear() {
    whole_ = false;
    strengths_ = py::none();
  }

 private:
  void add(const SteerProgram& program) {
    plans_.push_back(program.plan());
    whole_ = whole_ && program.whole();
    adds_ = adds_ && program.adds();
    has_last_ = has_last_ || program.plan().positions == saerec::Positions::kLast;
    if (program.width() == 0 || program.width() == width_) return;
    whole_ = whole_ && width_ == 0;
    width_ = program.width();
  }

  py::object programs_, strengths_;
  py::tuple shape_;
  std::vector<saerec::SteerPlan> plans_;
  std::vector<int32_t> sequence_plans_;
  int64_t strengths_rows_ = -1, width_ = 0;
  bool each_ = false, whole_ = true, adds_ = true, has_last_ = false, paused_ = false;
};

// A steer call with the autoencoder fixed.
class BoundSteer {
 public:
  BoundSteer(int dtype, const py::tuple& weight_enc, const py::object& bias, const py::object& shift,
             const py::tuple& weight_dec, int64_t k, const py::object& thresholds, const py::object& packed) {
    set_autoencoder(params_, dtype, weight_enc, bias, shift, weight_dec, k, thresholds, packed);
  }

  // values (float32) replace those of one plan where they are not 0: (n_edits), or one row a sequence at values_stride.
  // x has any strides, out (rows, d) is contiguous.
  float run(uintptr_t x, int64_t rows, int64_t row_stride, int64_t col_stride, int64_t length, uintptr_t out,
            const SteerPlans& plans, uintptr_t values, int64_t values_stride, uintptr_t valid, int threads) const {
    saerec::SteerParams params = params_;
    const int64_t d = params.weight_enc.cols;
    params.x = {pointer<void>(x), params.weight_enc.dtype, rows, d, row_stride, col_stride};
    params.out = {pointer<void>(out), params.weight_enc.dtype, rows, d, d, 1};
    params.length = length;
    params.plans = plans.plans().data();
    params.n_plans = static_cast<int64_t>(plans.plans().size());
    params.sequence_plans = plans.sequence_plans();
    params.valid = pointer<const bool>(valid);
    params.threads = threads;
    saerec::SteerPlan with_values;
    if (values != 0) {
      with_values = plans.plans()[0];
      with_values.values = pointer<const float>(values);
      with_values.values_stride = values_stride;
      params.plans = &with_values;
    }
    const py::gil_scoped_release release;
    return saerec::steer(params);
  }

 private:
  saerec::SteerParams params_;
};

// Steering of a module's output where nothing is out of the ordinary, in one call. Between two forward passes of a
// model the caches forget interpreted code, which then costs more than the kernel; so this reads the tensors through
// the Python C API, and allocates nothing but the output.
class PlainSteer {
 public:
  // seen: (dict, name, value, whether plans that only add depend on it) for everything that bound was made from;
  // tensors among the values may not have been written to either. functions: empty_like, is_grad_enabled,
  // get_num_threads, and those that count the modes that want to see torch's calls. x has to be a plain torch.Tensor,
  // tensor_type, of dtype x_dtype, a mask one of dtype mask_dtype, strengths are of strengths_dtype.
  PlainSteer(py::object bound, const py::list& seen, py::object tensor_type, py::object x_dtype, py::object mask_dtype,
             py::object strengths_dtype, int64_t width, const py::tuple& functions)
      : bound_(std::move(bound)),
        steer_(bound_.cast<const BoundSteer&>()),
        tensor_type_(std::move(tensor_type)),
        x_dtype_(std::move(x_dtype)),
        mask_dtype_(std::move(mask_dtype)),
        strengths_dtype_(std::move(strengths_dtype)),
        width_(width),
        empty_like_(functions[0]),
        is_grad_enabled_(functions[1]),
        get_num_threads_(functions[2]) {
    for (std::size_t i = 3; i < functions.size(); ++i) count_modes_.push_back(functions[i]);
    for (const py::handle entry : seen) {
      const py::tuple parts = entry.cast<py::tuple>();
      Seen one = {parts[0], parts[1], parts[2], is_tensor(parts[2].ptr()), parts[3].cast<bool>(), 0, 0};
      if (one.is_tensor) {
        one.address = address_of(one.value);
        one.version = integer(version_.of(one.value));
      }
      seen_.push_back(one);
    }
  }

  // The steered copy of x, None where anything is not as it was, or not plain; all of it is then for the caller to do.
  py::object run(const py::object& x, const py::object& mask, const SteerPlans& plans) const {
    try {
      if (!is_plain(x, x_dtype_) || called(is_grad_enabled_).is(py::handle(Py_True))) return py::none();
      for (const py::object& count : count_modes_) {
        if (integer(called(count)) != 0) return py::none();
      }
      if (!is_current(plans.adds())) return py::none();
      const py::tuple shape = shape_.of(x);
      const std::size_t dimensions = shape.size();
      if (dimensions < 2 || dimensions > 3 || integer(shape[dimensions - 1]) != width_) return py::none();
      const int64_t sequences = integer(shape[0]), length = dimensions == 3 ? integer(shape[1]) : 1;
      if (!plans.fits(sequences, width_, dimensions == 3)) return py::none();
      uintptr_t valid = 0;
      if (!mask.is_none()) {
        if (!is_plain(mask, mask_dtype_)) return py::none();
        const py::tuple mask_shape = shape_.of(mask);
        if (mask_shape.size() + 1 != dimensions || integer(mask_shape[0]) != sequences) return py::none();
        if (dimensions == 3 && integer(mask_shape[1]) != length) return py::none();
        valid = address_of(mask);
      }
      // The caller's own tensor may have been given other memory, as a module's move to another dtype does.
      const py::object& given = plans.strengths();
      if (!given.is_none() && (!is_tensor(given.ptr()) || !is_readable(given, strengths_dtype_) ||
                               !shape_.of(given).equal(plans.strengths_shape()))) {
        return py::none();
      }
      const py::object out = called(empty_like_, x);
      const uintptr_t from = address_of(x), to = address_of(out);
      const int threads = static_cast<int>(integer(called(get_num_threads_)));
      std::vector<float> values;
      if (!given.is_none()) {
        const auto* strengths = pointer<const float>(address_of(given));
        // Whoever writes to them pauses this first, and cannot do so before the interpreter is released below.
        if (plans.paused()) return py::none();
        values.assign(strengths, strengths + plans.n_strengths());
      }
      steer_.run(from, sequences * length, width_, 1, length, to, plans, reinterpret_cast<uintptr_t>(values.data()),
                 plans.strengths_stride(), valid, threads);
      return out;
    } catch (py::error_already_set& error) {
      if (!error.matches(PyExc_RuntimeError)) throw;
      return py::none();  // a tensor that does not tell, as those of function transforms
    }
  }

  // What it refers to may refer to it in turn: an autoencoder that holds the handle on its own states, say.
  int visit(visitproc visit, void* arg) const {
    Py_VISIT(bound_.ptr());
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
  }

  // Whether nothing was replaced or written to; of what plans that only add depend on, or of all.
  bool is_current(bool adds) const {
    if (cleared_) return false;
    for (const Seen& one : seen_) {
      if (adds && !one.matters_to_adds) continue;
      if (PyDict_GetItemWithError(one.holder.ptr(), one.name.ptr()) != one.value.ptr()) return false;
      if (!one.is_tensor) continue;
      if (integer(version_.of(one.value)) != one.version || address_of(one.value) != one.address) return false;
    }
    return true;
  }

 private:
  struct Seen {
    py::object holder, name, value;
    bool is_tensor, matters_to_adds;
    uintptr_t address;
    int64_t version;
  };

  // An attribute of tensors, or what a method without arguments returns. Looked up in the type once: where that finds
  // what C implements, it is called as it is.
  class Reader {
   public:
    Reader(const py::object& tensor_type, const char* name) : name_(interned(name)) {
      descriptor_ = checked(PyObject_GetAttr(tensor_type.ptr(), name_.ptr()));
      is_method_ = PyCallable_Check(descriptor_.ptr()) != 0;
      if (Py_TYPE(descriptor_.ptr()) == &PyGetSetDescr_Type) {
        attribute_ = reinterpret_cast<PyGetSetDescrObject*>(descriptor_.ptr())->d_getset;
      } else if (Py_TYPE(descriptor_.ptr()) == &PyMethodDescr_Type) {
        PyMethodDef* method = reinterpret_cast<PyMethodDescrObject*>(descriptor_.ptr())->d_method;
        if (method->ml_flags == METH_NOARGS) method_ = method->ml_meth;
      }
    }

    py::object of(const py::object& tensor) const {
      if (attribute_ != nullptr) return checked(attribute_->get(tensor.ptr(), attribute_->closure));
      if (method_ != nullptr) return checked(method_(tensor.ptr(), nullptr));
      return checked(is_method_ ? PyObject_CallMethodNoArgs(tensor.ptr(), name_.ptr())
                                : PyObject_GetAttr(tensor.ptr(), name_.ptr()));
    }

   private:
    py::str name_;
    py::object descriptor_;
    bool is_method_;
    PyGetSetDef* attribute_ = nullptr;
    PyCFunction method_ = nullptr;
  };

  static py::object called(const py::object& function) { return checked(PyObject_CallNoArgs(function.ptr())); }

  static py::object called(const py::object& function, const py::object& argument) {
    return checked(PyObject_CallOneArg(function.ptr(), argument.ptr()));
  }

  uintptr_t address_of(const py::object& tensor) const { return static_cast<uintptr_t>(integer(data_ptr_.of(tensor))); }

  bool is_tensor(PyObject* value) const { return PyObject_TypeCheck(value, type_of(tensor_type_)) != 0; }

  static PyTypeObject* type_of(const py::object& type) { return reinterpret_cast<PyTypeObject*>(type.ptr()); }

  // No subclass, which may be a stand-in without memory.
  bool is_plain(const py::object& tensor, const py::object& dtype) const {
    return Py_TYPE(tensor.ptr()) == type_of(tensor_type_) && is_readable(tensor, dtype);
  }

  // Contiguous, where the kernel can read it, and holding what it stands for rather than its negative.
  bool is_readable(const py::object& tensor, const py::object& dtype) const {
    const py::handle yes = Py_True, no = Py_False;
    return dtype_.of(tensor).is(dtype) && is_cpu_.of(tensor).is(yes) && is_contiguous_.of(tensor).is(yes) &&
           is_neg_.of(tensor).is(no);
  }

  py::object bound_;
  const BoundSteer& steer_;
  py::object tensor_type_, x_dtype_, mask_dtype_, strengths_dtype_;
  int64_t width_;
  bool cleared_ = false;
  py::object empty_like_, is_grad_enabled_, get_num_threads_;
  std::vector<py::object> count_modes_;
  std::vector<Seen> seen_;
  Reader data_ptr_{tensor_type_, "data_ptr"}, version_{tensor_type_, "_version"}, shape_{tensor_type_, "shape"},
      dtype_{tensor_type_, "dtype"}, is_cpu_{tensor_type_, "is_cpu"}, is_contiguous_{tensor_type_, "is_contiguous"},
      is_neg_{tensor_type_, "is_neg"};
};

// Makes the cycle collector see what a Class holds.
template <class Class>
void collect_cycles(PyHeapTypeObject* heap_type) {
  PyTypeObject* type = &heap_type->ht_type;
  type->tp_flags |= Py_TPFLAGS_HAVE_GC;
  type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    // Not yet constructed, it holds nothing.
    return py::detail::is_holder_constructed(self) ? py::cast<const Class&>(py::handle(self)).visit(visit, arg) : 0;
  };
  type->tp_clear = [](PyObject* self) {
    if (py::detail::is_holder_constructed(self)) py::cast<Class&>(py::handle(self)).clear();
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
      .def(py::init<const py::tuple&, const py::object&, const py::tuple&, bool, int, float, bool, bool>());
  py::class_<SteerPlans>(module, "SteerPlans", py::custom_type_setup(&collect_cycles<SteerPlans>))
      .def(py::init<py::object, py::object>())
      .def("pause", &SteerPlans::pause);
  py::class_<BoundSteer>(module, "BoundSteer")
      .def(py::init<int, const py::tuple&, const py::object&, const py::object&, const py::tuple&, int64_t,
                    const py::object&, const py::object&>())
      .def("run", &BoundSteer::run);
  py::class_<PlainSteer>(module, "PlainSteer", py::custom_type_setup(&collect_cycles<PlainSteer>))
      .def(py::init<py::object, const py::list&, py::object, py::object, py::object, py::object, int64_t,
                    const py::tuple&>())
      .def("run", &PlainSteer::run)
      .def("is_current", &PlainSteer::is_current, py::arg("adds") = false);
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
