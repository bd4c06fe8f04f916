#include "steer_launch.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <vector>

namespace saerec {
namespace cuda {
namespace {

constexpr int kTileRows[] = {1, 4, 8};
constexpr int kMostClusterBlocks = 8;        // the most that every chip with clusters takes
constexpr int64_t kLeastSliceFeatures = 64;  // smaller slices leave warps of a block without a tile
constexpr int kClusterCapability = 90;
constexpr int kLeastCapability = 80;

int vector_elements(DType dtype) { return dtype == DType::kFloat32 ? Float32::kVector : Float16::kVector; }

KernelPlan compile(const CudaSteerParams& params) {
  KernelPlan plan = {};
  std::vector<int64_t> features(params.edit_features, params.edit_features + params.n_edits);
  std::sort(features.begin(), features.end());
  features.erase(std::unique(features.begin(), features.end()), features.end());
  plan.slots = static_cast<int32_t>(features.size());
  int place = 0;
  for (int slot = 0; slot < plan.slots; ++slot) {
    plan.features[slot] = static_cast<int32_t>(features[slot]);
    plan.first_edit[slot] = static_cast<uint16_t>(place);
    plan.adds_only[slot] = 1;
    for (int64_t i = 0; i < params.n_edits; ++i) {
      if (params.edit_features[i] != features[slot]) continue;
      plan.edits[place] = static_cast<uint8_t>(i);
      plan.ops[place] = static_cast<uint8_t>(params.edit_ops[i]);
      ++place;
      if (params.edit_ops[i] != static_cast<int64_t>(EditOp::kAdd)) plan.adds_only[slot] = 0;
    }
  }
  plan.first_edit[plan.slots] = static_cast<uint16_t>(place);
  return plan;
}

bool needs_activations(const CudaSteerParams& params) {
  return std::any_of(params.edit_ops, params.edit_ops + params.n_edits,
                     [](int64_t op) { return op != static_cast<int64_t>(EditOp::kAdd); });
}

bool encodes(const CudaSteerParams& params) {
  return params.reconstruct || (params.k > 0 && needs_activations(params));
}

bool rows_aligned(const Matrix& matrix) {
  const int64_t row_bytes = matrix.row_stride * dtype_size(matrix.dtype);
  return reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0 && row_bytes % 16 == 0;
}

int64_t shared_bytes(const CudaSteerParams& params, int tile_rows, int64_t owned_rows) {
  return 4 * layout_of(vector_elements(params.x.dtype), tile_rows, owned_rows, static_cast<int>(params.weight_enc.rows),
                       static_cast<int>(params.x.cols))
                 .words;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int cluster_blocks(const CudaSteerParams& params, const CudaDevice& device) {
  if (device.capability < kClusterCapability) return 1;
  int blocks = kMostClusterBlocks;
  while (blocks > 1 && params.weight_enc.rows < blocks * kLeastSliceFeatures) blocks /= 2;
  return blocks;
}

// The smallest tile with which all blocks run at once, one per multiprocessor: fewer rows a tile spread the work, more
// save reads of W_enc.
int tile_rows(const CudaSteerParams& params, const CudaDevice& device, int blocks) {
  int chosen = 1;
  for (const int rows : kTileRows) {
    if (shared_bytes(params, rows, 0) > device.shared_memory) break;
    chosen = rows;
    if (ceil_div(params.x.rows, rows) * blocks <= device.multiprocessors) break;
  }
  return chosen;
}

std::string problem(const CudaSteerParams& params, const CudaDevice& device) {
  const auto text = [](int64_t number) { return std::to_string(number); };
  constexpr int64_t kMost32 = std::numeric_limits<int32_t>::max();
  if (device.capability < kLeastCapability) {
    return "device: expected compute capability 8.0 or newer, got " + text(device.capability / 10) + "." +
           text(device.capability % 10);
  }
  if (encodes(params) && params.k > kMaxTopK)
    return "k: expected at most " + text(kMaxTopK) + ", got " + text(params.k);
  if (params.n_edits > kMaxEdits) return "edits: expected at most " + text(kMaxEdits) + ", got " + text(params.n_edits);
  if (params.weight_enc.rows > kMost32 / 2) {
    return "W_enc: expected at most " + text(kMost32 / 2) + " features, got " + text(params.weight_enc.rows);
  }
  if (params.x.cols > kMost32 / 64 || shared_bytes(params, 1, 0) > device.shared_memory) {
    return "x: a width of " + text(params.x.cols) + " does not fit into the " + text(device.shared_memory) +
           " bytes of shared memory that a block of this device has";
  }
  if (params.x.rows > kMost32 / kMostClusterBlocks) {
    return "x: expected at most " + text(kMost32 / kMostClusterBlocks) + " rows, got " + text(params.x.rows);
  }
  return "";
}

}  // namespace

SteerLaunch plan_steer(const CudaSteerParams& params, const CudaDevice& device) {
  const std::string reason = problem(params, device);
  if (!reason.empty()) throw std::invalid_argument(reason);
  SteerLaunch launch;
  launch.encodes = encodes(params);
  if (launch.encodes) {
    launch.cluster_blocks = cluster_blocks(params, device);
    launch.tile_rows = tile_rows(params, device, launch.cluster_blocks);
    const int64_t owned_rows = ceil_div(launch.tile_rows, launch.cluster_blocks);
    launch.shared_bytes = shared_bytes(params, launch.tile_rows, owned_rows);
    if (launch.shared_bytes > device.shared_memory) {
      launch.shared_bytes = shared_bytes(params, launch.tile_rows, 0);
      launch.workspace_bytes = 4 * params.x.rows * params.weight_enc.rows;
    }
  } else {
    launch.shared_bytes = shared_bytes(params, 1, 0);
  }
  launch.blocks = ceil_div(params.x.rows, launch.tile_rows) * launch.cluster_blocks;

  KernelArguments& arguments = launch.arguments;
  arguments = {};
  arguments.x = params.x.data;
  arguments.x_row_stride = params.x.row_stride;
  arguments.x_col_stride = params.x.col_stride;
  arguments.weight_enc = params.weight_enc.data;
  arguments.weight_enc_stride = params.weight_enc.row_stride;
  arguments.weight_enc_aligned = rows_aligned(params.weight_enc);
  arguments.bias = params.bias.data;
  arguments.bias_stride = params.bias.stride;
  arguments.shift = params.shift.data;
  arguments.shift_stride = params.shift.stride;
  arguments.weight_dec = params.weight_dec.data;
  arguments.weight_dec_stride = params.weight_dec.row_stride;
  arguments.weight_dec_aligned = rows_aligned(params.weight_dec);
  arguments.thresholds = static_cast<const float*>(params.thresholds.data);
  arguments.threshold_stride = params.thresholds.size == 1 ? 0 : params.thresholds.stride;
  arguments.edit_values = params.edit_values;
  arguments.edit_values_row_stride = params.edit_values_row_stride;
  arguments.row_mask = params.row_mask;
  arguments.out = params.out.data;
  arguments.rows = params.x.rows;
  arguments.n = static_cast<int32_t>(params.weight_enc.rows);
  arguments.d = static_cast<int32_t>(params.x.cols);
  arguments.k = static_cast<int32_t>(params.k);
  arguments.reconstruct = params.reconstruct;
  arguments.needs_scores = needs_activations(params);
  arguments.plan = compile(params);
  return launch;
}

}  // namespace cuda

std::string cuda_steer_problem(const CudaSteerParams& params, const CudaDevice& device) {
  return cuda::problem(params, device);
}

int64_t cuda_steer_workspace(const CudaSteerParams& params, const CudaDevice& device) {
  return cuda::plan_steer(params, device).workspace_bytes;
}

}  // namespace saerec
