// What kernel code needs of the machine that runs it, and the number formats.
//
// Kernels are written against a Machine: thread indices, barriers, exchanges within a warp, memory of the other blocks
// of a cluster. Here is the one that a GPU runs. tests/kernels/cuda/emulation has another, which runs every thread of
// every block on the CPU, so that the same lines are executed where there is no GPU. Arithmetic is written with fmaf
// where it is to be fused and compiled with -fmad=false, so that both give the same bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define SAEREC_DEVICE __device__ __forceinline__
#define SAEREC_HOST_DEVICE __host__ __device__
#define SAEREC_UNROLL _Pragma("unroll")
// By a constant expression that is in scope.
#define SAEREC_UNROLL_BY(count) SAEREC_PRAGMA(unroll count)
#define SAEREC_PRAGMA(text) _Pragma(#text)
#else
#define SAEREC_DEVICE inline
#define SAEREC_HOST_DEVICE
#define SAEREC_UNROLL
#define SAEREC_UNROLL_BY(count)
#endif

namespace saerec {
namespace cuda {

constexpr int kWarpSize = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

#if defined(__CUDACC__)

struct GpuMachine {
  int blocks_per_cluster;

  __device__ __forceinline__ int thread() const { return static_cast<int>(threadIdx.x); }
  // The cluster's index in the grid, and the block's in its cluster (clusters are runs of blocks).
  __device__ __forceinline__ int64_t cluster() const { return static_cast<int>(blockIdx.x) / blocks_per_cluster; }
  __device__ __forceinline__ int rank() const { return static_cast<int>(blockIdx.x) % blocks_per_cluster; }
  __device__ __forceinline__ int ranks() const { return blocks_per_cluster; }

  __device__ __forceinline__ char* shared() const {
    extern __shared__ __align__(16) char memory[];
    return memory;
  }

  // The same place of shared memory in another block of the cluster.
  template <class T>
  __device__ __forceinline__ T* remote(T* place, int rank) const {
#if __CUDA_ARCH__ >= 900
    if (blocks_per_cluster > 1) {
      return static_cast<T*>(__cluster_map_shared_rank(place, static_cast<unsigned>(rank)));
    }
#endif
    return place;
  }

  __device__ __forceinline__ void sync() const { __syncthreads(); }

  // Orders accesses to shared and global memory among all threads of the cluster.
  __device__ __forceinline__ void sync_cluster() const {
#if __CUDA_ARCH__ >= 900
    if (blocks_per_cluster > 1) {
      __cluster_barrier_arrive();
      __cluster_barrier_wait();
      return;
    }
#endif
    __syncthreads();
  }

  // All 32 lanes of a warp take part in each of these.
  __device__ __forceinline__ float shuffle_xor(float value, int mask) const {
    return __shfl_xor_sync(0xffffffffu, value, mask);
  }
  __device__ __forceinline__ uint32_t shuffle_up(uint32_t value, int distance) const {
    return __shfl_up_sync(0xffffffffu, value, static_cast<unsigned>(distance));
  }
  __device__ __forceinline__ uint32_t ballot(bool predicate) const { return __ballot_sync(0xffffffffu, predicate); }

  __device__ __forceinline__ void increment(uint32_t* counter) const { atomicAdd(counter, 1u); }
};

SAEREC_DEVICE uint32_t float_bits(float value) { return __float_as_uint(value); }
SAEREC_DEVICE float bits_float(uint32_t bits) { return __uint_as_float(bits); }
SAEREC_DEVICE int count_bits(uint32_t bits) { return __popc(bits); }

SAEREC_DEVICE float widen_half(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

SAEREC_DEVICE uint16_t narrow_half(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

#else

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline int count_bits(uint32_t bits) {
  int count = 0;
  for (; bits != 0; bits &= bits - 1) ++count;
  return count;
}

// Defined by whoever compiles kernels for the CPU.
float widen_half(uint16_t bits);
uint16_t narrow_half(float value);

#endif

SAEREC_DEVICE int minimum(int a, int b) { return a < b ? a : b; }

// kVector elements are 16 bytes: what one lane loads at a time.
struct Float32 {
  using Storage = float;
  static constexpr int kVector = 4;
  static SAEREC_DEVICE float widen(float value) { return value; }
  static SAEREC_DEVICE float narrow(float value) { return value; }
};

struct BFloat16 {
  using Storage = uint16_t;
  static constexpr int kVector = 8;
  static SAEREC_DEVICE float widen(uint16_t bits) { return bits_float(static_cast<uint32_t>(bits) << 16); }
  // To nearest, ties to even; a NaN stays one.
  static SAEREC_DEVICE uint16_t narrow(float value) {
    if (value != value) return 0x7fc0;
    const uint32_t bits = float_bits(value);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
};

struct Float16 {
  using Storage = uint16_t;
  static constexpr int kVector = 8;
  static SAEREC_DEVICE float widen(uint16_t bits) { return widen_half(bits); }
  static SAEREC_DEVICE uint16_t narrow(float value) { return narrow_half(value); }
};

#if defined(__CUDACC__)
using Vector16 = uint4;
#else
struct Vector16 {
  uint32_t x, y, z, w;
};
#endif

// A number of memory that nothing writes while the kernel runs: such loads may pass stores, so that several are under
// way.
template <class T>
SAEREC_DEVICE T read_only(const T* place) {
#if defined(__CUDACC__)
  return __ldg(place);
#else
  return *place;
#endif
}

// 16 bytes of such memory at an address that is a multiple of 16.
SAEREC_DEVICE Vector16 load_vector(const void* place) {
#if defined(__CUDACC__)
  return __ldg(static_cast<const uint4*>(place));
#else
  Vector16 vector;
  std::memcpy(&vector, __builtin_assume_aligned(place, 16), sizeof vector);
  return vector;
#endif
}

SAEREC_DEVICE Vector16 load_vector_shared(const float* place) {
#if defined(__CUDACC__)
  return *reinterpret_cast<const uint4*>(place);
#else
  return load_vector(place);
#endif
}

// Elements [part, part + 4) of a vector; part is a multiple of 4.
SAEREC_DEVICE void widen_four(Float32, const Vector16& vector, int, float (&out)[4]) {
  out[0] = bits_float(vector.x);
  out[1] = bits_float(vector.y);
  out[2] = bits_float(vector.z);
  out[3] = bits_float(vector.w);
}

template <class Element>
SAEREC_DEVICE void widen_four(Element, const Vector16& vector, int part, float (&out)[4]) {
  const uint32_t low = part == 0 ? vector.x : vector.z, high = part == 0 ? vector.y : vector.w;
  out[0] = Element::widen(static_cast<uint16_t>(low & 0xffffu));
  out[1] = Element::widen(static_cast<uint16_t>(low >> 16));
  out[2] = Element::widen(static_cast<uint16_t>(high & 0xffffu));
  out[3] = Element::widen(static_cast<uint16_t>(high >> 16));
}

// Columns [column, column + 4) of a row at any address, zeros beyond its d elements.
template <class Element>
SAEREC_DEVICE void load_four(const typename Element::Storage* row, int column, int d, float (&out)[4]) {
  SAEREC_UNROLL
  for (int j = 0; j < 4; ++j) out[j] = column + j < d ? Element::widen(row[column + j]) : 0.0f;
}

}  // namespace cuda
}  // namespace saerec
