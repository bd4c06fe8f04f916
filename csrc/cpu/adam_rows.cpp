// Adam over rows of a parameter, in the arithmetic of torch's fused CPU kernel. Compiled once per tier; the scalar tier
// rounds products before it adds them, and agrees to rounding only.
//
// Floor: 28 bytes an element (parameter, gradient and two moments read; parameter and moments written), and two
// divisions and a square root, some 50 cycles per 16 elements on AVX-512: bound by memory where the parameters leave
// the cache.
#include "kernels.h"
#include "simd.h"
#include "simd_arithmetic.h"
#include "tier.inc"

namespace saerec {
namespace SAEREC_TIER {
namespace {

// Bits other than the sign's. Plain integers: compilers vectorise this.
bool any_nonzero(const float* p, int64_t count) {
  constexpr int64_t kBlock = 16;
  int64_t j = 0;
  for (; j + kBlock <= count; j += kBlock) {
    uint32_t bits = 0;
    for (int64_t i = 0; i < kBlock; ++i) bits |= to_bits(p[j + i]);
    if (bits << 1 != 0) return true;
  }
  for (; j < count; ++j) {
    if (to_bits(p[j]) << 1 != 0) return true;
  }
  return false;
}

struct Update {
  Vec negative_step_size, one_minus_beta1, beta2, one_minus_beta2, correction2_sqrt, epsilon;

  explicit Update(const AdamTask& task)
      : negative_step_size(set1(task.negative_step_size)),
        one_minus_beta1(set1(task.one_minus_beta1)),
        beta2(set1(task.beta2)),
        one_minus_beta2(set1(task.one_minus_beta2)),
        correction2_sqrt(set1(task.correction2_sqrt)),
        epsilon(set1(task.epsilon)) {}

  Vec apply(Vec parameter, Vec gradient, Vec& exp_avg, Vec& exp_avg_sq) const {
    exp_avg = fmadd(one_minus_beta1, sub(gradient, exp_avg), exp_avg);
    exp_avg_sq = fmadd(mul(one_minus_beta2, gradient), gradient, mul(exp_avg_sq, beta2));
    const Vec denominator = add(div(sqrt(exp_avg_sq), correction2_sqrt), epsilon);
    return add(parameter, div(mul(negative_step_size, exp_avg), denominator));
  }
};

// Calls body(column, load, store) for every vector of a row; the last may be partial.
template <class Body>
void for_vectors(int64_t cols, const Body& body) {
  int64_t j = 0;
  for (; j + kLanes <= cols; j += kLanes) {
    body(j, [](const float* p) { return load(F32{}, p); }, [](float* p, Vec a) { store(F32{}, p, a); });
  }
  if (j < cols) {
    const int64_t count = cols - j;
    body(
        j, [count](const float* p) { return load_partial(F32{}, p, count); },
        [count](float* p, Vec a) { store_partial(F32{}, p, count, a); });
  }
}

}  // namespace

void adam_rows(const AdamTask& task) {
  const Update update(task);
  const int64_t cols = task.cols;
  for (int64_t row = task.row_begin; row < task.row_end; ++row) {
    float* parameter = task.parameter + row * cols;
    const float* gradient = task.gradient + row * cols;
    float* exp_avg = task.exp_avg + row * cols;
    float* exp_avg_sq = task.exp_avg_sq + row * cols;
    if (!any_nonzero(exp_avg_sq, cols) && !any_nonzero(gradient, cols) && !any_nonzero(exp_avg, cols)) continue;
    if (!task.unit_rows) {
      for_vectors(cols, [&](int64_t j, auto get, auto put) {
        Vec m = get(exp_avg + j), v = get(exp_avg_sq + j);
        put(parameter + j, update.apply(get(parameter + j), get(gradient + j), m, v));
        put(exp_avg + j, m);
        put(exp_avg_sq + j, v);
      });
      continue;
    }
    Vec dot = zero();
    for_vectors(cols, [&](int64_t j, auto get, auto) { dot = fmadd(get(gradient + j), get(parameter + j), dot); });
    const Vec along = set1(-reduce_add(dot));
    Vec squares = zero();
    for_vectors(cols, [&](int64_t j, auto get, auto put) {
      const Vec p = get(parameter + j);
      Vec m = get(exp_avg + j), v = get(exp_avg_sq + j);
      const Vec updated = update.apply(p, fmadd(along, p, get(gradient + j)), m, v);
      squares = fmadd(updated, updated, squares);
      put(parameter + j, updated);
      put(exp_avg + j, m);
      put(exp_avg_sq + j, v);
    });
    const float norm = __builtin_sqrtf(reduce_add(squares));
    if (norm == 0.0f) continue;
    const Vec divisor = set1(norm);
    for_vectors(cols, [&](int64_t j, auto get, auto put) { put(parameter + j, div(get(parameter + j), divisor)); });
  }
}

}  // namespace SAEREC_TIER
}  // namespace saerec
