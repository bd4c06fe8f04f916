// Memory a thread keeps between calls. Tasks are bounded in size (kChunkRows), so this does not grow with the batch;
// fresh allocations of this size would be handed back to the system and faulted in again on every call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace saerec {

// One growing, 64-byte aligned buffer; get() invalidates what it returned before.
class ScratchBuffer {
 public:
  ScratchBuffer() = default;
  ScratchBuffer(const ScratchBuffer&) = delete;
  ScratchBuffer& operator=(const ScratchBuffer&) = delete;
  ~ScratchBuffer() { std::free(data_); }

  template <class T>
  T* get(int64_t count) {
    const std::size_t bytes = (static_cast<std::size_t>(count) * sizeof(T) + 63) / 64 * 64;
    if (bytes > bytes_) {
      std::free(data_);
      bytes_ = 0;
      data_ = std::aligned_alloc(64, bytes);
      if (data_ == nullptr) throw std::bad_alloc();
      bytes_ = bytes;
    }
    return static_cast<T*>(data_);
  }

  // Gives memory of more than `limit` bytes back.
  void release_above(std::size_t limit) {
    if (bytes_ <= limit) return;
    std::free(data_);
    data_ = nullptr;
    bytes_ = 0;
  }

 private:
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace saerec
