// The C interface of the emulated kernels, for tests/kernels/cuda/emulation.py. Functions return 0, or 1 with the
// reason in `message`.
#include <cstdio>
#include <exception>
#include <stdexcept>
#include <vector>

#include "machine.h"
#include "steer_launch.h"

namespace {

using saerec::DType;
using saerec::cuda::EmulatedMachine;

constexpr std::size_t kMessageBytes = 1000;

template <class Body>
int guarded(char* message, const Body& body) {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(message, kMessageBytes, "%s", error.what());
    return 1;
  }
}

// Reads the flat arguments in order.
class Words {
 public:
  explicit Words(const int64_t* words) : next_(words) {}
  int64_t number() { return *next_++; }
  template <class T>
  T* pointer() {
    return reinterpret_cast<T*>(*next_++);
  }
  saerec::Matrix matrix(DType dtype) {
    saerec::Matrix m;
    m.data = pointer<void>();
    m.dtype = dtype;
    m.rows = number();
    m.cols = number();
    m.row_stride = number();
    m.col_stride = number();
    return m;
  }
  saerec::Vector vector(DType dtype) {
    saerec::Vector v;
    v.data = pointer<const void>();
    v.dtype = dtype;
    v.size = number();
    v.stride = number();
    return v;
  }

 private:
  const int64_t* next_;
};

struct Call {
  saerec::CudaSteerParams params;
  saerec::CudaDevice device;

  explicit Call(const int64_t* flat) {
    Words words(flat);
    const auto dtype = static_cast<DType>(words.number());
    params.x = words.matrix(dtype);
    params.weight_enc = words.matrix(dtype);
    params.bias = words.vector(dtype);
    params.shift = words.vector(dtype);
    params.weight_dec = words.matrix(dtype);
    params.k = words.number();
    params.thresholds = words.vector(DType::kFloat32);
    params.reconstruct = words.number() != 0;
    params.n_edits = words.number();
    params.edit_features = words.pointer<const int64_t>();
    params.edit_ops = words.pointer<const int64_t>();
    params.edit_values = words.pointer<const float>();
    params.edit_values_row_stride = words.number();
    params.row_mask = words.pointer<const bool>();
    params.out = words.matrix(dtype);
    device.capability = static_cast<int>(words.number());
    device.multiprocessors = static_cast<int>(words.number());
    device.shared_memory = words.number();
  }
};

template <class Element>
void run(const saerec::cuda::SteerLaunch& launch, uint64_t seed) {
  using namespace saerec::cuda;
  const auto& arguments = launch.arguments;
  emulate(launch.blocks / launch.cluster_blocks, launch.cluster_blocks, launch.shared_bytes, seed,
          [&](EmulatedMachine& machine) {
            if (!launch.encodes) {
              steer_slots<Element>(machine, arguments);
            } else if (launch.tile_rows == 1) {
              steer_encoded<Element, 1>(machine, arguments);
            } else if (launch.tile_rows == 4) {
              steer_encoded<Element, 4>(machine, arguments);
            } else {
              steer_encoded<Element, 8>(machine, arguments);
            }
          });
}

}  // namespace

extern "C" {

// shape: (encodes, tile rows, blocks of a cluster, blocks, shared bytes, workspace bytes)
int saerec_plan_steer(const int64_t* words, int64_t* shape, char* message) {
  return guarded(message, [&] {
    const Call call(words);
    const auto launch = saerec::cuda::plan_steer(call.params, call.device);
    const int64_t values[] = {launch.encodes, launch.tile_rows,    launch.cluster_blocks,
                              launch.blocks,  launch.shared_bytes, launch.workspace_bytes};
    for (std::size_t i = 0; i < sizeof values / sizeof *values; ++i) shape[i] = values[i];
  });
}

int saerec_emulate_steer(const int64_t* words, uint32_t* workspace, uint64_t seed, char* message) {
  return guarded(message, [&] {
    const Call call(words);
    if (call.params.x.rows == 0 || call.params.x.cols == 0) return;
    auto launch = saerec::cuda::plan_steer(call.params, call.device);
    if (launch.workspace_bytes > 0) launch.arguments.keys = workspace;
    switch (call.params.x.dtype) {
      case DType::kFloat32:
        return run<saerec::cuda::Float32>(launch, seed);
      case DType::kBFloat16:
        return run<saerec::cuda::BFloat16>(launch, seed);
      case DType::kFloat16:
        return run<saerec::cuda::Float16>(launch, seed);
    }
  });
}

// The k best of n scores, as flags and as values read back from their keys.
int saerec_emulate_selection(const float* scores, int64_t n, int64_t k, uint64_t seed, bool* selected, float* values,
                             char* message) {
  return guarded(message, [&] {
    using namespace saerec::cuda;
    std::vector<uint32_t> keys(static_cast<std::size_t>(n));
    for (int64_t i = 0; i < n; ++i) {
      keys[i] = score_key(scores[i]);
      values[i] = key_score(keys[i]);
    }
    constexpr int kSmall = 16;
    emulate(1, 1, 4 * (kHistogramWords + kSmall), seed, [&](EmulatedMachine& machine) {
      uint32_t* words = reinterpret_cast<uint32_t*>(machine.shared());
      const SelectionScratch scratch = {words + kSmall, words, words + kWarps};
      const Cut cut = select_top_k(machine, keys.data(), static_cast<int>(n), static_cast<int>(k), scratch);
      for (int64_t i = machine.thread(); i < n; i += kThreads) {
        selected[i] = is_selected(cut, keys[i], static_cast<int>(i));
      }
    });
  });
}

// Items of [begin, end) whose flag is set, in order, as compact() places them; places holds their count first.
int saerec_emulate_compaction(const bool* flags, int64_t begin, int64_t end, uint64_t seed, int32_t* places,
                              char* message) {
  return guarded(message, [&] {
    using namespace saerec::cuda;
    emulate(1, 1, 4 * kWarps, seed, [&](EmulatedMachine& machine) {
      const uint32_t total = compact(
          machine, static_cast<int>(begin), static_cast<int>(end), reinterpret_cast<uint32_t*>(machine.shared()),
          [&](int item) { return flags[item]; }, [&](uint32_t place, int item) { places[1 + place] = item; });
      if (machine.thread() == 0) places[0] = static_cast<int32_t>(total);
    });
  });
}

}  // extern "C"
