// Typed views of memory owned by the caller. All strides are in elements, not bytes.
#pragma once

#include <cstdint>

namespace saerec {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum class IndexType : int { kInt32 = 0, kInt64 = 1 };

static inline int64_t dtype_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

struct Matrix {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t row_stride = 0;
  int64_t col_stride = 1;
};

// An absent vector (no bias) has data == nullptr.
struct Vector {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t size = 0;
  int64_t stride = 1;
};

struct IndexArray {
  const void* data = nullptr;
  IndexType type = IndexType::kInt64;
};

static inline int64_t index_at(const IndexArray& array, int64_t i) {
  return array.type == IndexType::kInt32 ? static_cast<const int32_t*>(array.data)[i]
                                         : static_cast<const int64_t*>(array.data)[i];
}

}  // namespace saerec
