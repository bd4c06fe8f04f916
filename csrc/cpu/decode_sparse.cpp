#include "saerec/decode_sparse.h"

#include <algorithm>
#include <vector>

#include "convert.h"
#include "encode_rows.h"
#include "kernels.h"
#include "parallel.h"

namespace saerec {

void decode_sparse(const DecodeSparseParams& params) {
  const int64_t rows = params.out.rows, d = params.out.cols;
  if (rows == 0 || d == 0) return;
  const std::vector<float> bias = widened(params.bias);
  const int threads = useful_threads(params.threads, (params.offsets[rows] + rows) * d);
  const int64_t chunk_rows = std::max<int64_t>(1, std::min(kChunkRows, (rows + threads - 1) / threads));
  parallel_for((rows + chunk_rows - 1) / chunk_rows, threads, [&](int64_t chunk) {
    const int64_t first = chunk * chunk_rows;
    DecodeTask task;
    task.begins = params.offsets + first;
    task.ends = task.begins + 1;
    task.indices = params.indices;
    task.values = params.values;
    task.weight = params.weight;
    task.bias = bias.empty() ? nullptr : bias.data();
    task.out = row_range(params.out, first, std::min(chunk_rows, rows - first));
    active_kernels().decode_rows(task);
  });
}

}  // namespace saerec
