// From the arguments of a steer call to those of its kernel, and the shape of its launch. Host code alone: the launcher
// and the tests' emulation share it.
#pragma once

#include "saerec/cuda_steer.h"
#include "steer_kernel.cuh"

namespace saerec {
namespace cuda {

struct SteerLaunch {
  KernelArguments arguments;
  bool encodes = false;  // steer_encoded, else steer_slots
  int tile_rows = 1;     // 1, 4 or 8
  int cluster_blocks = 1;
  int64_t blocks = 0;
  int64_t shared_bytes = 0;
  int64_t workspace_bytes = 0;
};

// The launch but for the address of its workspace. Throws std::invalid_argument where the arguments are not supported.
SteerLaunch plan_steer(const CudaSteerParams& params, const CudaDevice& device);

}  // namespace cuda
}  // namespace saerec
