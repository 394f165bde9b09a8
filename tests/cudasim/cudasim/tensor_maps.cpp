// SPDX-License-Identifier: BSD-3-Clause
//
// Copies and stores of boxes of a matrix, and what the driver wants of their tensor maps.
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
constexpr Access kBoxStore = {"bulk_store_2d", /*stores=*/true, /*sees_stores=*/true,
                              /*is_atomic=*/false, /*arrives_later=*/true};
constexpr SharedAccess kBoxIsRead = {"bulk_store_2d()", /*writes=*/false, /*in_async_proxy=*/true};

const gpu::TensorMapShape& matrix_of(const gpu::TensorMap* map, const char* function) {
  if (!map->is_encoded) fail(std::string(function) + " by a tensor map that was not encoded");
  return map->shape;
}

int64_t box_row_bytes(const gpu::TensorMapShape& matrix) {
  return int64_t{matrix.box_columns} * matrix.element_bytes;
}

// The bytes of a box's row that are in the matrix, and those before them.
struct BoxRow {
  int64_t before;
  int64_t bytes;
  uintptr_t address;
};

BoxRow row_of_box(const gpu::TensorMapShape& matrix, int64_t column, int64_t row) {
  if (row < 0 || row >= matrix.rows) return {};
  const int64_t first = std::clamp(column, int64_t{0}, matrix.columns);
  const int64_t last = std::clamp(column + matrix.box_columns, int64_t{0}, matrix.columns);
  if (first == last) return {};
  const int64_t offset = row * matrix.row_bytes + first * matrix.element_bytes;
  return {(first - column) * matrix.element_bytes, (last - first) * matrix.element_bytes,
          reinterpret_cast<uintptr_t>(matrix.data) + static_cast<uintptr_t>(offset)};
}

}  // namespace

void bulk_copy_2d(void* shared, const gpu::TensorMap* map, int64_t column, int64_t row,
                  void* barrier) {
  const gpu::TensorMapShape& matrix = matrix_of(map, "bulk_copy_2d()");
  const int64_t whole_row = box_row_bytes(matrix);
  const int64_t bytes = whole_row * matrix.box_rows;
  check_range("bulk_copy_2d() to", shared, bytes, kBoxAlignment);
  Block& block = *current->block;
  CopyBarrierState& state = find_barrier(barrier, "bulk_copy_2d()");
  block.accesses.touch(block, shared, bytes, kBoxLands, state.agent, next_epoch(state));
  std::memset(shared, kPoison, static_cast<size_t>(bytes));
  Traffic* traffic = nullptr;
  for (int i = 0; i < matrix.box_rows; ++i) {
    auto* to = static_cast<unsigned char*>(shared) + i * whole_row;
    const auto add = [&](int64_t offset, const void* from, int64_t count) {
      if (count > 0) state.copies.push_back({to + offset, from, count, /*in_bulk=*/true});
    };
    const BoxRow inside = row_of_box(matrix, column, row + i);
    const auto* from = reinterpret_cast<const void*>(inside.address);
    add(0, nullptr, inside.before);
    add(inside.before, from, inside.bytes);
    add(inside.before + inside.bytes, nullptr, whole_row - inside.before - inside.bytes);
    if (inside.bytes == 0) continue;
    traffic = &memory.touch(from, inside.bytes, matrix.element_bytes, kBoxLoad);
    traffic->bulk_bytes += inside.bytes;
  }
  if (traffic != nullptr) {
    ++traffic->bulk_copies;
    ++traffic->box_copies;
  }
  resume_all(state.waiting);
}

void bulk_store_2d(const gpu::TensorMap* map, int64_t column, int64_t row, const void* shared) {
  const gpu::TensorMapShape& matrix = matrix_of(map, "bulk_store_2d()");
  const int64_t whole_row = box_row_bytes(matrix);
  const int64_t bytes = whole_row * matrix.box_rows;
  check_range("bulk_store_2d() from", shared, bytes, kBoxAlignment);
  start_bulk_store(shared, bytes, kBoxIsRead);
  Traffic* traffic = nullptr;
  for (int i = 0; i < matrix.box_rows; ++i) {
    const BoxRow inside = row_of_box(matrix, column, row + i);
    if (inside.bytes == 0) continue;
    auto* to = reinterpret_cast<void*>(inside.address);
    traffic = &memory.touch(to, inside.bytes, matrix.element_bytes, kBoxStore);
    traffic->bulk_stored_bytes += inside.bytes;
    const auto* from = static_cast<const unsigned char*>(shared) + i * whole_row + inside.before;
    store_piece(to, from, inside.bytes, kBoxIsRead.function);
  }
  if (traffic != nullptr) {
    ++traffic->bulk_stores;
    ++traffic->box_stores;
  }
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
