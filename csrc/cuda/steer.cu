// Launches of the serving steer; the kernels are in steer_kernel.cuh.
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "steer_launch.h"

namespace saerec {
namespace cuda {
namespace {

// Two blocks a multiprocessor bound the registers to 128 a thread.
constexpr int kResidentBlocks = 2;

template <class Element>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    steer_slots_kernel(const __grid_constant__ KernelArguments arguments) {
  GpuMachine machine{1};
  steer_slots<Element>(machine, arguments);
}

template <class Element, int kRows>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    steer_encoded_kernel(const __grid_constant__ KernelArguments arguments, int cluster_blocks) {
  GpuMachine machine{cluster_blocks};
  steer_encoded<Element, kRows>(machine, arguments);
}

void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  // Errors of the caller's earlier, asynchronous work stay what they are; one of a launch is cleared.
  cudaGetLastError();
  throw std::runtime_error(std::string("CUDA: ") + call + ": " + cudaGetErrorString(status));
}

// A block gets more shared memory than this only if its kernel asked for it.
constexpr int64_t kDefaultSharedBytes = 48 * 1024;

template <class... Parameters, class... Arguments>
void launch_kernel(void (*kernel)(Parameters...), const SteerLaunch& launch, cudaStream_t stream,
                   Arguments... arguments) {
  if (launch.shared_bytes > kDefaultSharedBytes) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(launch.shared_bytes)),
          "cudaFuncSetAttribute");
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(launch.cluster_blocks);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t configuration = {};
  configuration.gridDim = dim3(static_cast<unsigned>(launch.blocks));
  configuration.blockDim = dim3(kThreads);
  configuration.dynamicSmemBytes = static_cast<size_t>(launch.shared_bytes);
  configuration.stream = stream;
  configuration.attrs = &attribute;
  configuration.numAttrs = launch.cluster_blocks > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&configuration, kernel, arguments...), "launch of steer");
}

template <class Element>
void launch_for(const SteerLaunch& launch, cudaStream_t stream) {
  if (!launch.encodes) {
    launch_kernel(steer_slots_kernel<Element>, launch, stream, launch.arguments);
  } else if (launch.tile_rows == 1) {
    launch_kernel(steer_encoded_kernel<Element, 1>, launch, stream, launch.arguments, launch.cluster_blocks);
  } else if (launch.tile_rows == 4) {
    launch_kernel(steer_encoded_kernel<Element, 4>, launch, stream, launch.arguments, launch.cluster_blocks);
  } else {
    launch_kernel(steer_encoded_kernel<Element, 8>, launch, stream, launch.arguments, launch.cluster_blocks);
  }
}

// The caller's current device is what it was when this ends: PyTorch asks the driver for it.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (device != previous_) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = device != previous_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

int attribute_of(int device, cudaDeviceAttr attribute) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

}  // namespace
}  // namespace cuda

CudaDevice cuda_device(int index) {
  CudaDevice device;
  device.index = index;
  device.capability = 10 * cuda::attribute_of(index, cudaDevAttrComputeCapabilityMajor) +
                      cuda::attribute_of(index, cudaDevAttrComputeCapabilityMinor);
  device.multiprocessors = cuda::attribute_of(index, cudaDevAttrMultiProcessorCount);
  device.shared_memory = cuda::attribute_of(index, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return device;
}

int cuda_device_count(std::string* reason) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess) return count;
  cudaGetLastError();
  *reason = cudaGetErrorString(status);
  return 0;
}

void cuda_steer(const CudaSteerParams& params, const CudaDevice& device, void* workspace, int64_t workspace_bytes,
                void* stream) {
  if (params.x.rows == 0 || params.x.cols == 0) return;
  cuda::SteerLaunch launch = cuda::plan_steer(params, device);
  if (workspace_bytes < launch.workspace_bytes) {
    throw std::invalid_argument("workspace: expected " + std::to_string(launch.workspace_bytes) + " bytes, got " +
                                std::to_string(workspace_bytes));
  }
  if (launch.workspace_bytes > 0) launch.arguments.keys = static_cast<uint32_t*>(workspace);
  const cuda::DeviceGuard guard(device.index);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (params.x.dtype) {
    case DType::kFloat32:
      cuda::launch_for<cuda::Float32>(launch, cuda_stream);
      break;
    case DType::kBFloat16:
      cuda::launch_for<cuda::BFloat16>(launch, cuda_stream);
      break;
    case DType::kFloat16:
      cuda::launch_for<cuda::Float16>(launch, cuda_stream);
      break;
  }
}

}  // namespace saerec
