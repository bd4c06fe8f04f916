// The `count` largest of the values of sparse rows, over all rows: descending value, NaN largest, ties by position.
#pragma once

#include "saerec/views.h"

namespace saerec {

struct LargestEntriesParams {
  const int64_t* offsets = nullptr;  // (rows + 1)
  int64_t rows = 0;
  Vector values;                    // one per entry
  int64_t count = 0;                // 0 <= count <= number of entries
  int64_t* kept_offsets = nullptr;  // (rows + 1)
  int64_t* kept = nullptr;          // (count) positions in values, ascending
  int threads = 1;
};

void largest_entries(const LargestEntriesParams& params);

}  // namespace saerec
