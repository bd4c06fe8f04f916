#include "saerec/packed.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace saerec {
namespace {

constexpr char kMagic[8] = {'s', 'a', 'e', 'r', 'e', 'c', 'P', 'W'};
// Blocks a task packs: enough work to be worth a thread.
constexpr int64_t kTaskBlocks = 8;

int64_t padded(int64_t n) { return (n + kPackedBlock - 1) / kPackedBlock * kPackedBlock; }
int64_t quads_of(int64_t d) { return (d + 3) / 4; }
int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

PackedView parts(const void* data, int64_t n, int64_t d) {
  const char* base = static_cast<const char*>(data) + sizeof(PackedHeader);
  const int64_t column = aligned(padded(n) * static_cast<int64_t>(sizeof(float)));
  PackedView view;
  view.scales = reinterpret_cast<const float*>(base);
  view.biases = reinterpret_cast<const float*>(base + column);
  view.margins = reinterpret_cast<const float*>(base + 2 * column);
  view.codes = reinterpret_cast<const uint8_t*>(base + 3 * column);
  view.quads = quads_of(d);
  return view;
}

}  // namespace

int64_t packed_size(int64_t n, int64_t d) {
  return static_cast<int64_t>(sizeof(PackedHeader)) + 3 * aligned(padded(n) * static_cast<int64_t>(sizeof(float))) +
         padded(n) * quads_of(d) * 4;
}

void pack(const PackParams& params) {
  const int64_t n = params.weight.rows, d = params.weight.cols;
  const PackedView view = parts(params.out, n, d);
  const int64_t blocks = padded(n) / kPackedBlock, tasks = (blocks + kTaskBlocks - 1) / kTaskBlocks;
  std::vector<float> max_bias(static_cast<std::size_t>(tasks));
  std::vector<char> usable(static_cast<std::size_t>(tasks));
  parallel_for(tasks, useful_threads(params.threads, n * d), [&](int64_t index) {
    PackTask task;
    task.weight = params.weight;
    task.bias = params.bias;
    task.view = view;
    task.block_begin = index * kTaskBlocks;
    task.block_end = std::min(task.block_begin + kTaskBlocks, blocks);
    thread_local ScratchBuffer row, row_codes;
    task.code_stride = aligned(4 * view.quads);
    task.row = row.get<float>(d);
    // A vector of codes may overhang its row.
    task.row_codes = row_codes.get<uint8_t>(kFeatureBlock * task.code_stride + 64);
    active_kernels().pack_blocks(task);
    max_bias[index] = task.max_bias;
    usable[index] = task.usable;
  });
  PackedHeader header = {};
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  header.version = kPackedVersion;
  header.usable = d <= kMaxScreenedDimensions && std::find(usable.begin(), usable.end(), 0) == usable.end();
  header.n = n;
  header.d = d;
  header.bytes = packed_size(n, d);
  header.max_bias = tasks > 0 ? *std::max_element(max_bias.begin(), max_bias.end()) : 0.0f;
  std::memcpy(params.out, &header, sizeof header);
}

bool open_packed(const void* data, int64_t bytes, int64_t n, int64_t d, PackedView* view) {
  PackedHeader header;
  if (bytes < static_cast<int64_t>(sizeof header)) {
    throw std::invalid_argument("packed: expected at least " + std::to_string(sizeof header) + " bytes, got " +
                                std::to_string(bytes));
  }
  std::memcpy(&header, data, sizeof header);
  if (std::memcmp(header.magic, kMagic, sizeof kMagic) != 0) {
    throw std::invalid_argument("packed: not packed weights; make them with saerec_fast.pack_weights");
  }
  if (header.version != kPackedVersion) {
    throw std::invalid_argument("packed: expected version " + std::to_string(kPackedVersion) + ", got " +
                                std::to_string(header.version) + "; pack the weights again");
  }
  if (header.n != n || header.d != d) {
    throw std::invalid_argument("packed: expected weights of shape (" + std::to_string(n) + ", " + std::to_string(d) +
                                "), got (" + std::to_string(header.n) + ", " + std::to_string(header.d) + ")");
  }
  if (header.bytes != packed_size(n, d) || bytes < header.bytes) {
    throw std::invalid_argument("packed: expected " + std::to_string(packed_size(n, d)) + " bytes, got " +
                                std::to_string(bytes));
  }
  if (header.usable == 0) return false;
  *view = parts(data, n, d);
  view->max_bias = header.max_bias;
  return true;
}

}  // namespace saerec
