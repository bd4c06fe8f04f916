// Runs kernel code on the CPU: every thread of a cluster is a fiber, which runs until it waits for others.
//
// One fiber runs at a time, so races cannot corrupt anything; they show as results that depend on the order. A warp
// runs as far as it can before the next one has its turn, in an order drawn from a seed, and so do its lanes: a missing
// barrier gives a thread ahead of the others stale or overwritten values in one order or another. Shared memory starts
// as NaN, between guards. Threads that wait at different barriers end the launch with an error.
#pragma once

#include <csetjmp>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "device.cuh"

namespace saerec {
namespace cuda {

struct EmulatedBarrier {
  int expected = 0;
  int arrived = 0;
  uint64_t phase = 0;
};

struct EmulatedWarp {
  EmulatedBarrier barrier;
  // Exchanges in turn use one half each, so that one barrier an exchange is enough.
  uint32_t slots[2][kWarpSize];
};

struct EmulatedBlock {
  std::vector<uint32_t> memory;  // with guards
  EmulatedBarrier barrier;
  EmulatedWarp warps[kWarps];
};

struct EmulatedCluster {
  int64_t index = 0;
  std::vector<EmulatedBlock> blocks;
  EmulatedBarrier barrier;
};

struct Fiber {
  EmulatedCluster* cluster = nullptr;
  int rank = 0;
  int thread = 0;
  unsigned exchanges = 0;
  bool started = false;
  bool done = false;
  const EmulatedBarrier* waits_for = nullptr;
  uint64_t waits_beyond = 0;
  std::jmp_buf* context = nullptr;
};

// Suspends the running fiber until its barrier has passed the phase it waits beyond.
void suspend(Fiber& fiber);

class EmulatedMachine {
 public:
  explicit EmulatedMachine(Fiber& fiber) : fiber_(fiber) {}

  int thread() const { return fiber_.thread; }
  int64_t cluster() const { return fiber_.cluster->index; }
  int rank() const { return fiber_.rank; }
  int ranks() const { return static_cast<int>(fiber_.cluster->blocks.size()); }
  char* shared() const;

  template <class T>
  T* remote(T* place, int rank) const {
    return reinterpret_cast<T*>(reinterpret_cast<char*>(place) - shared() + shared_of(rank));
  }

  void sync() { wait(block().barrier); }
  void sync_cluster() { wait(fiber_.cluster->barrier); }

  float shuffle_xor(float value, int mask) {
    return bits_float(exchange(float_bits(value))[fiber_.thread % kWarpSize ^ mask]);
  }

  uint32_t shuffle_up(uint32_t value, int distance) {
    const int lane = fiber_.thread % kWarpSize;
    return exchange(value)[lane >= distance ? lane - distance : lane];
  }

  uint32_t ballot(bool predicate) {
    const uint32_t* votes = exchange(predicate ? 1u : 0u);
    uint32_t bits = 0;
    for (int lane = 0; lane < kWarpSize; ++lane) bits |= votes[lane] << lane;
    return bits;
  }

  void increment(uint32_t* counter) { ++*counter; }

 private:
  EmulatedBlock& block() const { return fiber_.cluster->blocks[fiber_.rank]; }
  char* shared_of(int rank) const;
  void wait(EmulatedBarrier& barrier);
  const uint32_t* exchange(uint32_t value);

  Fiber& fiber_;
};

// Runs `kernel` for all threads of `clusters` clusters. Throws std::runtime_error where threads wait for each other
// forever or a guard of shared memory was overwritten.
void emulate(int64_t clusters, int blocks_per_cluster, int64_t shared_bytes, uint64_t seed,
             const std::function<void(EmulatedMachine&)>& kernel);

}  // namespace cuda
}  // namespace saerec
