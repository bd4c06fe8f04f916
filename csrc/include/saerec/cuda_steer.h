// steer (saerec/steer.h) for a serving batch on a CUDA device, in one launch on a stream.
//
// All addresses are of the device but those of the plan (edit_features, edit_ops). Weight matrices have unit column
// stride. Nothing is allocated and nothing waits for the device, so the launch can be captured in a CUDA graph; the
// plan is part of the launch, what edit_values and row_mask hold is read when it runs.
#pragma once

#include <cstdint>
#include <string>

#include "saerec/steer.h"

namespace saerec {

// One plan for all rows: steer's delta or reconstruct, see there, without directions and limits.
struct CudaSteerParams {
  Matrix x;           // (B, d)
  Matrix weight_enc;  // (n, d)
  Vector bias;        // (n) or absent
  Vector shift;       // (d) or absent
  Matrix weight_dec;  // (n, d)
  int64_t k = 0;      // > 0: top-k; 0: thresholds
  Vector thresholds;  // (n), or size 1 for all features
  bool reconstruct = false;
  int64_t n_edits = 0;
  const int64_t* edit_features = nullptr;  // (n_edits), each in [0, n)
  const int64_t* edit_ops = nullptr;       // (n_edits), EditOp
  const float* edit_values = nullptr;      // (n_edits) at row stride 0, or (B, n_edits)
  int64_t edit_values_row_stride = 0;
  const bool* row_mask = nullptr;  // (B) or absent
  Matrix out;                      // (B, d) contiguous, dtype of x
};

// What a launch has to know of its device.
struct CudaDevice {
  int index = 0;
  int capability = 0;  // 10 * major + minor
  int multiprocessors = 0;
  int64_t shared_memory = 0;  // most bytes a block can ask for
};

// Throws std::runtime_error where there is no such device or no driver.
CudaDevice cuda_device(int index);

// Number of devices, 0 and the reason where the driver is missing or too old.
int cuda_device_count(std::string* reason);

// Why the kernel does not take these arguments, empty if it does.
std::string cuda_steer_problem(const CudaSteerParams& params, const CudaDevice& device);

// Bytes of device memory, aligned to 4, that the launch needs beside its arguments; 0 unless the scores of a row do not
// fit into shared memory.
int64_t cuda_steer_workspace(const CudaSteerParams& params, const CudaDevice& device);

// `stream` is a cudaStream_t of the device. Throws std::invalid_argument where cuda_steer_problem has something to say,
// std::runtime_error where the launch fails.
void cuda_steer(const CudaSteerParams& params, const CudaDevice& device, void* workspace, int64_t workspace_bytes,
                void* stream);

}  // namespace saerec
