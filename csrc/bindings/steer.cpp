#include "steer.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../cpu/parallel.h"
#include "python.h"
#include "saerec/steer.h"
#include "tensors.h"
#include "views.h"

namespace py = pybind11;

namespace saerec {
namespace bindings {
namespace {

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

// What a PlainSteer made of plans, for its autoencoder and the strengths that it found.
struct PreparedPlans {
  uint64_t steer = 0;                    // whose
  std::vector<float> values;             // (n_edits) or (sequences, n_edits), empty for the plans' own
  std::vector<saerec::SteerPlan> plans;  // with these values
  std::shared_ptr<const saerec::CompiledSteer> compiled;
  // What to add to hidden states, where that is all there is to do: float32 (d), or (length, d) for the last positions
  // of sequences of that length; else null. Made by the second pass, as most requests have but one.
  mutable py::object sum;
  mutable int64_t length = 0;  // 0 for any
  mutable bool has_looked_for_sum = false;

  bool is_for(uint64_t serial, const float* strengths, int64_t n_strengths) const {
    const std::size_t count = strengths == nullptr ? 0 : static_cast<std::size_t>(n_strengths);
    return steer == serial && values.size() == count &&
           (count == 0 || std::memcmp(values.data(), strengths, count * sizeof(float)) == 0);
  }
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
        const py::tuple shape = strengths_.attr("shape");
        const std::size_t dimensions = shape.size();
        if (dimensions == 2) strengths_rows_ = shape[0].cast<int64_t>();
        whole_ = whole_ && (dimensions == 1 || dimensions == 2) &&
                 shape[dimensions - 1].cast<int64_t>() == plans_[0].n_edits;
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
  // Whether strengths of this shape are still those that were given.
  bool takes(const TensorView& strengths) const {
    const int64_t n_edits = plans_[0].n_edits;
    if (strengths_rows_ < 0) return strengths.dimensions == 1 && strengths.shape[0] == n_edits;
    return strengths.dimensions == 2 && strengths.shape[0] == strengths_rows_ && strengths.shape[1] == n_edits;
  }
  int64_t n_strengths() const { return plans_[0].n_edits * (strengths_rows_ >= 0 ? strengths_rows_ : 1); }
  int64_t strengths_stride() const { return strengths_rows_ >= 0 ? plans_[0].n_edits : 0; }
  bool paused() const { return paused_; }
  bool adds() const { return adds_; }

  // Of the last PlainSteer that ran with these plans. Passes that have released the interpreter keep what they took.
  const std::shared_ptr<const PreparedPlans>& prepared() const { return prepared_; }
  void set_prepared(std::shared_ptr<const PreparedPlans> prepared) const { prepared_ = std::move(prepared); }

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
  std::vector<saerec::SteerPlan> plans_;
  std::vector<int32_t> sequence_plans_;
  mutable std::shared_ptr<const PreparedPlans> prepared_;
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

  const saerec::SteerParams& params() const { return params_; }

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
// model the caches forget code and tables, and each function that runs first costs about a microsecond, more than the
// kernel does for a row; so this calls as few as it can, and allocates nothing but the output.
class PlainSteer {
  // Beyond so many numbers reading them costs more than the few functions that are spared.
  static constexpr int64_t kLargestSum = 1 << 16;

 public:
  // Functions of torch.
  struct Functions {
    py::object empty_like, is_grad_enabled, get_num_threads, tensor;
    std::vector<py::object> count_modes;  // that want to see torch's calls
  };

  // seen: (dict, name, value, whether plans that only add depend on it) for everything that bound was made from;
  // tensors among the values may not have been written to either. functions: in the order of Functions. x has to be a
  // plain torch.Tensor, tensor_type, of dtype x_dtype, a mask one of dtype mask_dtype, strengths are of
  // strengths_dtype. exchange: see TensorReader.
  PlainSteer(py::object bound, const py::list& seen, const py::object& tensor_type, const py::object& exchange,
             py::object x_dtype, py::object mask_dtype, py::object strengths_dtype, const py::tuple& functions)
      : bound_(std::move(bound)),
        steer_(bound_.cast<const BoundSteer&>()),
        width_(steer_.params().weight_enc.cols),
        reader_(tensor_type, exchange),
        x_type_{std::move(x_dtype), dlpack_type(steer_.params().weight_enc.dtype)},
        mask_type_{std::move(mask_dtype), {dlpack::kBool, 8, 1}},
        strengths_type_{std::move(strengths_dtype), dlpack_type(DType::kFloat32)},
        functions_{functions[0], functions[1], functions[2], functions[3], {}} {
    for (std::size_t i = 4; i < functions.size(); ++i) functions_.count_modes.push_back(functions[i]);
    for (const py::handle entry : seen) {
      const py::tuple parts = entry.cast<py::tuple>();
      Seen one = {parts[0], parts[1], parts[2], reader_.is_tensor(py::object(parts[2]).ptr()), parts[3].cast<bool>(),
                  0,        0};
      if (one.is_tensor) {
        one.address = reader_.address_of(one.value);
        one.version = reader_.version_of(one.value);
      }
      seen_.push_back(one);
    }
  }

  // The steered copy of x, None where anything is not as it was, or not plain; all of it is then for the caller to do.
  py::object run(const py::object& x, const py::object& mask, const SteerPlans& plans) const {
    TensorView view, valid;
    if (!reader_.is_plain(x.ptr()) || !reader_.read(x, x_type_, view)) return py::none();
    const bool has_length = view.dimensions == 3;
    if (view.dimensions < 2 || view.shape[view.dimensions - 1] != width_) return py::none();
    const int64_t sequences = view.shape[0], length = has_length ? view.shape[1] : 1;
    if (called(functions_.is_grad_enabled).is(py::handle(Py_True))) return py::none();
    if (!is_current(plans.adds()) || !plans.fits(sequences, width_, has_length)) return py::none();
    if (!mask.is_none()) {
      if (!reader_.is_plain(mask.ptr()) || !reader_.read(mask, mask_type_, valid)) return py::none();
      if (valid.shape[0] != sequences || (has_length && valid.shape[1] != length)) return py::none();
      const bool has_column = valid.dimensions == view.dimensions && valid.shape[view.dimensions - 1] == 1;
      if (valid.dimensions + 1 != view.dimensions && !has_column) return py::none();
    }
    const float* strengths = nullptr;
    // The caller's own tensor may have been given other memory, as a module's move to another dtype does.
    if (const py::object& given = plans.strengths(); !given.is_none()) {
      TensorView found;
      if (!reader_.is_tensor(given.ptr()) || !reader_.read(given, strengths_type_, found)) return py::none();
      if (!plans.takes(found) || reader_.is_negative(given)) return py::none();
      strengths = static_cast<const float*>(found.data);
      // Whoever writes to them pauses this first, and cannot do so before they were compared or copied below.
      if (plans.paused()) return py::none();
    }
    const int64_t rows = sequences * length;
    std::shared_ptr<const PreparedPlans> prepared = plans.prepared();
    const bool is_prepared = prepared != nullptr && prepared->is_for(serial_, strengths, plans.n_strengths());
    if (is_prepared && prepared->sum && (prepared->length == 0 || prepared->length == length) &&
        (valid.data == nullptr || std::memchr(valid.data, 0, static_cast<std::size_t>(rows)) == nullptr)) {
      // A model adds all the time, so that this code is not cold; and modes see it.
      return checked(PyNumber_Add(x.ptr(), prepared->sum.ptr()));
    }
    for (const py::object& count : functions_.count_modes) {
      if (integer(called(count)) != 0) return py::none();
    }
    if (reader_.is_negative(x)) return py::none();
    if (!is_prepared) {
      prepared = prepare(plans, strengths);
    } else if (!prepared->has_looked_for_sum && plans.sequence_plans() == nullptr) {
      prepared->has_looked_for_sum = true;
      set_sum(*prepared, length);
    }
    py::object out = checked(PyObject_CallOneArg(functions_.empty_like.ptr(), x.ptr()));
    saerec::SteerParams params = steer_.params();
    params.x = {view.data, params.weight_enc.dtype, rows, width_, width_, 1};
    params.out = params.x;
    params.out.data = pointer<void>(reader_.address_of(out));
    params.length = length;
    params.plans = prepared->plans.data();
    params.n_plans = static_cast<int64_t>(prepared->plans.size());
    params.sequence_plans = plans.sequence_plans();
    params.valid = static_cast<const bool*>(valid.data);
    if (saerec::useful_threads(2, saerec::steer_operations(params, *prepared->compiled)) > 1) {
      params.threads = static_cast<int>(integer(called(functions_.get_num_threads)));
      const py::gil_scoped_release release;
      saerec::steer(params, *prepared->compiled);
    } else {
      // Sooner done than another thread would take over.
      saerec::steer(params, *prepared->compiled);
    }
    return out;
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
      if (reader_.version_of(one.value) != one.version || reader_.address_of(one.value) != one.address) return false;
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

  // Tells apart what was prepared for which.
  static uint64_t next_serial() {
    static uint64_t last = 0;
    return ++last;
  }

  static py::object called(const py::object& function) { return checked(PyObject_CallNoArgs(function.ptr())); }

  // For the passes to come, until the plans run with another autoencoder or with other strengths.
  std::shared_ptr<const PreparedPlans> prepare(const SteerPlans& plans, const float* strengths) const {
    const auto count = strengths == nullptr ? std::size_t{0} : static_cast<std::size_t>(plans.n_strengths());
    const auto prepared = std::make_shared<PreparedPlans>();
    prepared->steer = serial_;
    prepared->plans = plans.plans();
    if (count > 0) {
      prepared->values.assign(strengths, strengths + count);
      prepared->plans[0].values = prepared->values.data();
      prepared->plans[0].values_stride = plans.strengths_stride();
    }
    saerec::SteerParams params = steer_.params();
    params.plans = prepared->plans.data();
    params.n_plans = static_cast<int64_t>(prepared->plans.size());
    prepared->compiled = saerec::compile_steer(params);
    plans.set_prepared(prepared);
    return prepared;
  }

  void set_sum(const PreparedPlans& prepared, int64_t length) const {
    const float* vector = saerec::vector_to_add(prepared.plans.data(), *prepared.compiled);
    // The sum of a narrower type would be rounded otherwise.
    if (vector == nullptr || steer_.params().weight_dec.dtype != DType::kFloat32) return;
    const bool is_last = prepared.plans[0].positions == saerec::Positions::kLast;
    if (is_last && (length == 0 || length * width_ > kLargestSum)) return;
    py::list numbers;
    // The other positions: a sum with -0 changes no bit, not even that of a -0.
    for (int64_t i = 0; is_last && i < (length - 1) * width_; ++i) numbers.append(-0.0);
    for (int64_t j = 0; j < width_; ++j) numbers.append(static_cast<double>(vector[j]));
    py::object sum = functions_.tensor(numbers, py::arg("dtype") = strengths_type_.torch);
    if (is_last) {
      sum = sum.attr("view")(length, width_);
      prepared.length = length;
    }
    prepared.sum = std::move(sum);
  }

  py::object bound_;
  const BoundSteer& steer_;
  int64_t width_;
  uint64_t serial_ = next_serial();
  TensorReader reader_;
  ElementType x_type_, mask_type_, strengths_type_;
  Functions functions_;
  bool cleared_ = false;
  std::vector<Seen> seen_;
};

// Of an object of this type, without pybind11's search for it; null before its __init__.
template <class Class>
const Class* held(PyObject* object) {
  return static_cast<const Class*>(reinterpret_cast<py::detail::instance*>(object)->get_value_and_holder().value_ptr());
}

PyTypeObject* steer_plans_type = nullptr;

// PlainSteer.run(x, mask, plans). Called between two layers of a model, so that every table that pybind11 would look
// into is a miss: the arguments are taken as Python's own C functions take theirs.
PyObject* run_plain_steer(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  const bool fits = count == 3 && Py_TYPE(arguments[2]) == steer_plans_type;
  const PlainSteer* steer = held<PlainSteer>(self);
  const SteerPlans* plans = fits ? held<SteerPlans>(arguments[2]) : nullptr;
  if (steer == nullptr || plans == nullptr) {
    PyErr_SetString(PyExc_TypeError, "run: expected (x, mask, plans), plans being SteerPlans");
    return nullptr;
  }
  const auto borrowed = [](PyObject* object) { return py::reinterpret_borrow<py::object>(object); };
  try {
    return steer->run(borrowed(arguments[0]), borrowed(arguments[1]), *plans).release().ptr();
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_RuntimeError)) {
      error.restore();
      return nullptr;
    }
    // A tensor that does not tell, as those of function transforms.
  } catch (const std::exception&) {
    // The general way will say what is wrong.
  }
  Py_RETURN_NONE;
}

PyMethodDef run_plain_steer_method = {
    "run", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&run_plain_steer)), METH_FASTCALL,
    "run(x, mask, plans): the steered copy of x, or None where the general way has to do it"};

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

}  // namespace

void bind_steer(py::module_& module) {
  module.def("steer", &steer);
  py::class_<SteerProgram>(module, "SteerProgram")
      .def(py::init<const py::tuple&, const py::object&, const py::tuple&, bool, int, float, bool, bool>());
  py::class_<SteerPlans> steer_plans(module, "SteerPlans", py::custom_type_setup(&collect_cycles<SteerPlans>));
  steer_plans_type = reinterpret_cast<PyTypeObject*>(steer_plans.ptr());
  steer_plans.def(py::init<py::object, py::object>()).def("pause", &SteerPlans::pause);
  py::class_<BoundSteer>(module, "BoundSteer")
      .def(py::init<int, const py::tuple&, const py::object&, const py::object&, const py::tuple&, int64_t,
                    const py::object&, const py::object&>())
      .def("run", &BoundSteer::run);
  py::class_<PlainSteer> plain_steer(module, "PlainSteer", py::custom_type_setup(&collect_cycles<PlainSteer>));
  plain_steer
      .def(py::init<py::object, const py::list&, const py::object&, const py::object&, py::object, py::object,
                    py::object, const py::tuple&>())
      .def("is_current", &PlainSteer::is_current, py::arg("adds") = false);
  plain_steer.attr("run") =
      checked(PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(plain_steer.ptr()), &run_plain_steer_method));
}

}  // namespace bindings
}  // namespace saerec
