// SPDX-License-Identifier: BSD-3-Clause
//
// What a tensor map is made of, on a GPU as on a simulated one.
#pragma once

#include <cstdint>

namespace fastbn::gpu {

// A matrix in global memory, and the box of it that is copied at once.
struct TensorMapShape {
  const void* data;   // at a multiple of 16
  int element_bytes;  // 2, 4 or 8
  int64_t rows;
  int64_t columns;
  int64_t row_bytes;  // from one row to the next, a multiple of 16
  int box_rows;       // at most 256
  int box_columns;    // at most 256, and a multiple of 16 bytes
};

}  // namespace fastbn::gpu
