// SPDX-License-Identifier: BSD-3-Clause
//
// Copies of boxes of a matrix, and what the driver wants of their tensor maps.
#include <algorithm>
#include <cstring>
#include <string>

#include "copy_barriers.h"
#include "gpu.h"
#include "memory.h"

namespace fastbn {
namespace cudasim {
namespace {

constexpr int kMostOfBox = 256;
constexpr int64_t kMostOfMatrix = int64_t{1} << 32;
constexpr int64_t kMostBetweenRows = int64_t{1} << 40;
constexpr int64_t kBoxAlignment = 128;

constexpr Access kBoxLoad = {"bulk_copy_2d", /*stores=*/false, /*sees_stores=*/false};
constexpr SharedAccess kBoxLands = {"bulk_copy_2d()", /*writes=*/true, /*in_async_proxy=*/true};

}  // namespace

void bulk_copy_2d(void* shared, const gpu::TensorMap* map, int64_t column, int64_t row,
                  void* barrier) {
  if (!map->is_encoded) fail("bulk_copy_2d() by a tensor map that was not encoded");
  const gpu::TensorMapShape& matrix = map->shape;
  const int64_t box_row_bytes = int64_t{matrix.box_columns} * matrix.element_bytes;
  const int64_t bytes = box_row_bytes * matrix.box_rows;
  check_range("bulk_copy_2d() to", shared, bytes, kBoxAlignment);
  Block& block = *current->block;
  CopyBarrierState& state = find_barrier(barrier, "bulk_copy_2d()");
  block.accesses.touch(block, shared, bytes, kBoxLands, state.agent, next_epoch(state));
  std::memset(shared, kPoison, static_cast<size_t>(bytes));
  const int64_t first = std::clamp(column, int64_t{0}, matrix.columns);
  const int64_t last = std::clamp(column + matrix.box_columns, int64_t{0}, matrix.columns);
  const int64_t before = std::min((first - column) * matrix.element_bytes, box_row_bytes);
  const int64_t inside = (last - first) * matrix.element_bytes;
  Traffic* traffic = nullptr;
  for (int i = 0; i < matrix.box_rows; ++i) {
    auto* to = static_cast<unsigned char*>(shared) + i * box_row_bytes;
    const auto add = [&](int64_t offset, const void* from, int64_t count) {
      if (count > 0) state.copies.push_back({to + offset, from, count, /*in_bulk=*/true});
    };
    if (row + i < 0 || row + i >= matrix.rows || inside == 0) {
      add(0, nullptr, box_row_bytes);
      continue;
    }
    const auto* from = static_cast<const unsigned char*>(matrix.data) +
                       (row + i) * matrix.row_bytes + first * matrix.element_bytes;
    traffic = &memory.touch(from, inside, matrix.element_bytes, kBoxLoad);
    traffic->bulk_bytes += inside;
    add(0, nullptr, before);
    add(before, from, inside);
    add(before + inside, nullptr, box_row_bytes - before - inside);
  }
  if (traffic != nullptr) ++traffic->bulk_copies;
  resume_all(state.waiting);
}

}  // namespace cudasim

namespace gpu {

const char* encode_tensor_map(const TensorMapShape& shape, TensorMap* map) {
  using namespace cudasim;
  const auto is_multiple_of_16 = [](int64_t value) { return value % 16 == 0; };
  if (shape.element_bytes != 2 && shape.element_bytes != 4 && shape.element_bytes != 8) {
    return "elements of a tensor map have 2, 4 or 8 bytes";
  }
  if (!is_multiple_of_16(reinterpret_cast<intptr_t>(shape.data))) {
    return "the matrix of a tensor map begins at a multiple of 16";
  }
  if (std::min(shape.rows, shape.columns) < 1 ||
      std::max(shape.rows, shape.columns) > kMostOfMatrix) {
    return "the matrix of a tensor map has 1 to 2^32 rows and columns";
  }
  if (!is_multiple_of_16(shape.row_bytes) || shape.row_bytes < 0 ||
      shape.row_bytes >= kMostBetweenRows) {
    return "rows of a tensor map are a multiple of 16 bytes apart, and less than 2^40";
  }
  if (std::min(shape.box_rows, shape.box_columns) < 1 ||
      std::max(shape.box_rows, shape.box_columns) > kMostOfBox) {
    return "the box of a tensor map has 1 to 256 rows and columns";
  }
  if (!is_multiple_of_16(int64_t{shape.box_columns} * shape.element_bytes)) {
    return "rows of the box of a tensor map are a multiple of 16 bytes";
  }
  map->shape = shape;
  map->is_encoded = true;
  return nullptr;
}

}  // namespace gpu
}  // namespace fastbn
