#include "saerec/adam.h"

#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "parallel.h"

namespace saerec {

void adam_step(const AdamParams& params) {
  AdamTask base;
  base.parameter = params.parameter;
  base.gradient = params.gradient;
  base.exp_avg = params.exp_avg;
  base.exp_avg_sq = params.exp_avg_sq;
  base.cols = params.cols;
  const double correction1 = 1 - std::pow(params.beta1, params.step);
  base.negative_step_size = static_cast<float>(-(params.learning_rate / correction1));
  base.one_minus_beta1 = static_cast<float>(1 - params.beta1);
  base.beta2 = static_cast<float>(params.beta2);
  base.one_minus_beta2 = static_cast<float>(1 - params.beta2);
  base.correction2_sqrt = static_cast<float>(std::sqrt(1 - std::pow(params.beta2, params.step)));
  base.epsilon = static_cast<float>(params.epsilon);
  base.unit_rows = params.unit_rows;
  if (params.rows == 0 || params.cols == 0) return;
  // About eight operations an element, of which the division and the root are slow.
  const int threads = useful_threads(params.threads, params.rows * params.cols * 8);
  const int64_t rows = std::max<int64_t>(1, std::min<int64_t>(256, params.rows / (threads * 4)));
  parallel_for((params.rows + rows - 1) / rows, threads, [&](int64_t part) {
    AdamTask task = base;
    task.row_begin = part * rows;
    task.row_end = std::min(task.row_begin + rows, params.rows);
    active_kernels().adam_rows(task);
  });
}

}  // namespace saerec
