#include "machine.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <stdexcept>

#include "convert.h"

namespace saerec {
namespace cuda {
namespace {

constexpr uint32_t kPoison = 0x7fc0beef;  // as a float, a NaN
constexpr std::size_t kGuardWords = 64;
constexpr std::size_t kStackBytes = 64 * 1024;

// One fiber runs at a time in a process: emulate() is not reentrant.
std::jmp_buf scheduler;
const std::function<void(EmulatedMachine&)>* running_kernel = nullptr;
Fiber* starting = nullptr;

void fiber_main() {
  Fiber& fiber = *starting;
  EmulatedMachine machine(fiber);
  (*running_kernel)(machine);
  fiber.done = true;
  _longjmp(scheduler, 1);
}

class Stacks {
 public:
  explicit Stacks(std::size_t count) : bytes_(count * kStackBytes) {
    memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory_ == MAP_FAILED) throw std::runtime_error("no memory for the stacks of the fibers");
  }
  ~Stacks() { munmap(memory_, bytes_); }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  char* of(std::size_t index) const { return static_cast<char*>(memory_) + index * kStackBytes; }

 private:
  std::size_t bytes_;
  void* memory_;
};

// Runs the fiber until it is suspended or done.
void resume(Fiber& fiber, char* stack) {
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(*fiber.context, 1);
  fiber.started = true;
  starting = &fiber;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  setcontext(&context);
}

bool runnable(const Fiber& fiber) {
  return !fiber.done && (fiber.waits_for == nullptr || fiber.waits_for->phase > fiber.waits_beyond);
}

char* words_of(EmulatedBlock& block) { return reinterpret_cast<char*>(block.memory.data() + kGuardWords); }

void check_guards(const EmulatedBlock& block) {
  const auto is_poison = [](uint32_t word) { return word == kPoison; };
  if (!std::all_of(block.memory.begin(), block.memory.begin() + kGuardWords, is_poison) ||
      !std::all_of(block.memory.end() - kGuardWords, block.memory.end(), is_poison)) {
    throw std::runtime_error("a kernel wrote outside its shared memory");
  }
}

void run_cluster(EmulatedCluster& cluster, const Stacks& stacks, std::mt19937_64& random) {
  const int warps = static_cast<int>(cluster.blocks.size()) * kWarps;
  std::vector<Fiber> fibers(static_cast<std::size_t>(warps) * kWarpSize);
  std::vector<std::jmp_buf> contexts(fibers.size());
  for (std::size_t i = 0; i < fibers.size(); ++i) {
    fibers[i].cluster = &cluster;
    fibers[i].rank = static_cast<int>(i / kThreads);
    fibers[i].thread = static_cast<int>(i % kThreads);
    fibers[i].context = &contexts[i];
  }
  std::vector<std::size_t> warp_order(static_cast<std::size_t>(warps)), lane_order(kWarpSize);
  std::iota(warp_order.begin(), warp_order.end(), std::size_t{0});
  std::iota(lane_order.begin(), lane_order.end(), std::size_t{0});
  for (;;) {
    std::shuffle(warp_order.begin(), warp_order.end(), random);
    std::shuffle(lane_order.begin(), lane_order.end(), random);
    bool progress = false;
    for (const std::size_t warp : warp_order) {
      for (bool moved = true; moved; progress = progress || moved) {
        moved = false;
        for (const std::size_t lane : lane_order) {
          const std::size_t index = warp * kWarpSize + lane;
          if (!runnable(fibers[index])) continue;
          resume(fibers[index], stacks.of(index));
          moved = true;
        }
      }
    }
    if (progress) continue;
    if (std::all_of(fibers.begin(), fibers.end(), [](const Fiber& fiber) { return fiber.done; })) return;
    throw std::runtime_error("threads wait for each other forever: not all of them reached a barrier");
  }
}

}  // namespace

void suspend(Fiber& fiber) {
  if (_setjmp(*fiber.context) == 0) _longjmp(scheduler, 1);
}

char* EmulatedMachine::shared() const { return words_of(block()); }
char* EmulatedMachine::shared_of(int rank) const { return words_of(fiber_.cluster->blocks[rank]); }

void EmulatedMachine::wait(EmulatedBarrier& barrier) {
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.phase;
    return;
  }
  fiber_.waits_for = &barrier;
  fiber_.waits_beyond = barrier.phase;
  suspend(fiber_);
  fiber_.waits_for = nullptr;
}

const uint32_t* EmulatedMachine::exchange(uint32_t value) {
  EmulatedWarp& warp = block().warps[fiber_.thread / kWarpSize];
  uint32_t* slots = warp.slots[fiber_.exchanges++ % 2];
  slots[fiber_.thread % kWarpSize] = value;
  wait(warp.barrier);
  return slots;
}

void emulate(int64_t clusters, int blocks_per_cluster, int64_t shared_bytes, uint64_t seed,
             const std::function<void(EmulatedMachine&)>& kernel) {
  const Stacks stacks(static_cast<std::size_t>(blocks_per_cluster) * kThreads);
  std::mt19937_64 random(seed);
  running_kernel = &kernel;
  for (int64_t index = 0; index < clusters; ++index) {
    EmulatedCluster cluster;
    cluster.index = index;
    cluster.barrier.expected = blocks_per_cluster * kThreads;
    cluster.blocks.resize(static_cast<std::size_t>(blocks_per_cluster));
    for (EmulatedBlock& block : cluster.blocks) {
      block.memory.assign(static_cast<std::size_t>(shared_bytes / 4) + 2 * kGuardWords, kPoison);
      block.barrier.expected = kThreads;
      for (EmulatedWarp& warp : block.warps) warp.barrier.expected = kWarpSize;
    }
    run_cluster(cluster, stacks, random);
    for (const EmulatedBlock& block : cluster.blocks) check_guards(block);
  }
}

float widen_half(uint16_t bits) {
  const Vector half = {&bits, DType::kFloat16, 1, 1};
  return element_at(half, 0);
}

uint16_t narrow_half(float value) {
  uint16_t bits = 0;
  store_element(DType::kFloat16, &bits, 0, value);
  return bits;
}

}  // namespace cuda
}  // namespace saerec
