// SPDX-License-Identifier: BSD-3-Clause
//
// Copies of boxes of a matrix, and stores of them.
#include <algorithm>
#include <cmath>
#include <iterator>
#include <memory>

#include "selftest.h"

namespace fastbn::selftest {

namespace {

constexpr int kThreads = 64;
constexpr int kBoxRows = 8;
constexpr int kBoxColumns = 32;
constexpr int kBoxBytes = kBoxRows * kBoxColumns * static_cast<int>(sizeof(float));
constexpr int kStagesOffset = 128;
constexpr int kRows = 21;
constexpr int kColumns = 44;  // the last box has some that the matrix has not

enum class Fault {
  kNone,
  kExpectsWhatIsInside,
  kMisaligned,
  kNoWait,
  kRefillsTooEarly,
  kNotEncoded,
  kNoFence,
  kPlainStore,
  kReturnsEarly,
};

// Each block sums the rows of some columns of a matrix, a box at a time.
FASTBN_KERNEL(kThreads, 1)
sum_rows(FASTBN_PARAMETER gpu::TensorMap map, float* y, const int first_row, const Fault fault) {
  auto* full = static_cast<gpu::CopyBarrier*>(gpu::shared_memory());
  const float* box =
      reinterpret_cast<const float*>(reinterpret_cast<unsigned char*>(full) + kStagesOffset +
                                     (fault == Fault::kMisaligned ? 16 : 0));
  const int thread = gpu::thread_index();
  const int column = gpu::block_index() * kBoxColumns;
  if (thread == 0) gpu::init_barrier(full, 1);
  gpu::sync_block();
  float sum = 0;
  int parity = 0;
  for (int row = first_row; row < kRows; row += kBoxRows) {
    if (thread == 0) {
      const int inside = (kRows - row < kBoxRows ? kRows - row : kBoxRows) * kBoxColumns * 4;
      gpu::expect_bytes(full, fault == Fault::kExpectsWhatIsInside ? inside : kBoxBytes);
      gpu::bulk_copy_2d(const_cast<float*>(box), &map, column, row, full);
    }
    if (fault != Fault::kNoWait || thread != 0) gpu::wait_barrier(full, parity);
    if (fault == Fault::kRefillsTooEarly) gpu::sync_block();
    parity ^= 1;
    for (int i = 0; i < kBoxRows && thread < kBoxColumns; ++i) {
      sum += gpu::load_shared(box + i * kBoxColumns + thread);
    }
    if (fault != Fault::kRefillsTooEarly) gpu::sync_block();
  }
  if (thread < kBoxColumns) gpu::store<gpu::CacheHint::kKeep>(y + column + thread, sum);
}

// Each block doubles some columns of a matrix, a box at a time, where they lie in shared memory.
FASTBN_KERNEL(kThreads, 1)
double_boxes(FASTBN_PARAMETER gpu::TensorMap from, FASTBN_PARAMETER gpu::TensorMap to,
             const Fault fault) {
  auto* full = static_cast<gpu::CopyBarrier*>(gpu::shared_memory());
  auto* box = reinterpret_cast<float*>(reinterpret_cast<unsigned char*>(full) + kStagesOffset);
  const int thread = gpu::thread_index();
  const int column = gpu::block_index() * kBoxColumns;
  if (thread == 0) gpu::init_barrier(full, 1);
  gpu::sync_block();
  int parity = 0;
  for (int row = 0; row < kRows; row += kBoxRows) {
    if (thread == 0) {
      if (fault != Fault::kRefillsTooEarly) gpu::wait_bulk_stores_read<0>();
      gpu::expect_bytes(full, kBoxBytes);
      gpu::bulk_copy_2d(box, &from, column, row, full);
    }
    gpu::wait_barrier(full, parity);
    parity ^= 1;
    for (int i = thread; i < kBoxRows * kBoxColumns; i += kThreads) {
      const float value = 2 * gpu::load_shared(box + i);
      if (fault == Fault::kPlainStore && thread == 3) {
        box[i] = value;
      } else {
        gpu::store_shared(box + i, value);
      }
    }
    if (fault != Fault::kNoFence) gpu::fence_async_proxy();
    gpu::sync_block();
    if (thread == 0) {
      gpu::bulk_store_2d(&to, column, row, box + (fault == Fault::kMisaligned ? 4 : 0));
      gpu::commit_bulk_stores();
    }
  }
  if (thread == 0 && fault != Fault::kReturnsEarly) gpu::wait_bulk_stores_read<0>();
}

constexpr int kBlocks = 2;

void test_stores(const float* x, const gpu::TensorMapShape& shape) {
  std::vector<float> expected;
  for (int i = 0; i < kRows * kColumns; ++i) expected.push_back(2 * x[i]);
  // At a multiple of 16, as the matrix of a tensor map is.
  struct alignas(16) Matrix {
    float elements[kRows * kColumns];
  };
  const auto y = std::make_unique<Matrix>();
  cudasim::register_buffer(y->elements, sizeof(Matrix), "y", cudasim::Kind::kActivation,
                           /*writable=*/true);
  gpu::TensorMapShape shape_of_y = shape;
  shape_of_y.data = y->elements;
  gpu::TensorMap from = {}, to = {};
  check("both tensor maps are encoded", gpu::encode_tensor_map(shape, &from) == nullptr &&
                                            gpu::encode_tensor_map(shape_of_y, &to) == nullptr);
  const auto run = [&](Fault fault) {
    return gpu::launch(nullptr, {kBlocks, kThreads, kStagesOffset + 16 + kBoxBytes}, double_boxes,
                       from, fault == Fault::kNotEncoded ? gpu::TensorMap{} : to, fault);
  };
  const auto seeds_right_of = [&](Fault fault) {
    std::vector<float> result(expected.size());
    return seeds_right(expected, result, [&] {
      std::fill(std::begin(y->elements), std::end(y->elements), NAN);
      const char* error = run(fault);
      std::copy(std::begin(y->elements), std::end(y->elements), result.begin());
      return error;
    });
  };
  cudasim::take_report();
  check("stores of boxes are right under all seeds", seeds_right_of(Fault::kNone) == kSeeds);
  const cudasim::Traffic traffic =
      cudasim::take_report().launches[0].of(cudasim::Kind::kActivation);
  check("they are counted, but for what is not in the matrix",
        traffic.box_stores == kBlocks * 3 && traffic.bulk_stores == kBlocks * 3 &&
            traffic.written_bytes() == kRows * kColumns * 4);
  const auto finds = [&](const char* what, Fault fault, std::initializer_list<const char*> parts) {
    check(std::string(what) + " is noticed under all seeds", seeds_right_of(fault) == 0);
    check_text(std::string(what) + " is reported", faults_of_seeds([&] { return run(fault); }),
               parts);
  };
  finds("a box that is stored without a fence", Fault::kNoFence,
        {"bulk_store_2d() of 1024 bytes at byte 128 of shared memory, which thread ",
         " wrote, with no fence_async_proxy() and barrier after it since"});
  finds("a misaligned box that is stored", Fault::kMisaligned,
        {"bulk_store_2d() from shared memory that is not at a multiple of 128"});
  finds("storing a box that was written by other means", Fault::kPlainStore,
        {"bulk_store_2d() of 128 bytes at byte ", "not all of which a store_shared() wrote"});
  finds("filling what a store of a box reads", Fault::kRefillsTooEarly,
        {"bulk_copy_2d() of 1024 bytes at byte 128 of shared memory, which a bulk store may still "
         "be reading: no wait_bulk_stores_read() and barrier since"});
  finds("returning before the box is read", Fault::kReturnsEarly,
        {"returned while bulk stores may still be reading"});
  finds("storing by a tensor map that was not encoded", Fault::kNotEncoded,
        {"bulk_store_2d() by a tensor map that was not encoded"});
}

}  // namespace

void test_tensor_maps() {
  const std::vector<float> storage = count_to(kRows * kColumns + 4);
  const auto address = reinterpret_cast<uintptr_t>(storage.data());
  const float* x = storage.data() + (16 - address % 16) % 16 / sizeof(float);
  std::vector<float> expected(kBlocks * kBoxColumns);
  for (int i = 0; i < kRows * kColumns; ++i) expected[i % kColumns] += x[i];
  std::vector<float> y(expected.size());
  cudasim::register_buffer(x, kRows * kColumns * 4, "x", cudasim::Kind::kActivation,
                           /*writable=*/false);
  lend(y, "y", cudasim::Kind::kVector);

  const gpu::TensorMapShape right = {x, 4, kRows, kColumns, kColumns * 4, kBoxRows, kBoxColumns};
  gpu::TensorMap map = {};
  check("a right tensor map is encoded", gpu::encode_tensor_map(right, &map) == nullptr);
  const auto run = [&](int first_row, Fault fault) {
    return gpu::launch(nullptr, {kBlocks, kThreads, kStagesOffset + 16 + kBoxBytes}, sum_rows,
                       fault == Fault::kNotEncoded ? gpu::TensorMap{} : map, y.data(), first_row,
                       fault);
  };
  cudasim::take_report();
  check("copies of boxes are right under all seeds",
        seeds_right(expected, y, [&] { return run(0, Fault::kNone); }) == kSeeds);
  const cudasim::Traffic traffic =
      cudasim::take_report().launches[0].of(cudasim::Kind::kActivation);
  check("they are counted", traffic.box_copies == kBlocks * 3 &&
                                traffic.bulk_copies == kBlocks * 3 &&
                                traffic.read_bytes() == kRows * kColumns * 4);
  check("rows before the matrix are zero",
        seeds_right(expected, y, [&] { return run(-3, Fault::kNone); }) == kSeeds);
  const auto finds = [&](const char* what, Fault fault, std::initializer_list<const char*> parts) {
    check(std::string(what) + " is noticed under all seeds",
          seeds_right(expected, y, [&] { return run(0, fault); }) == 0);
    check_text(std::string(what) + " is reported", faults_of_seeds([&] { return run(0, fault); }),
               parts);
  };
  finds("expecting only what is in the matrix", Fault::kExpectsWhatIsInside,
        {"deadlock", "for phase 2 of the barrier at byte 0 of shared memory"});
  finds("a misaligned box", Fault::kMisaligned,
        {"bulk_copy_2d() to shared memory that is not at a multiple of 128"});
  finds("reading a box that has not landed", Fault::kNoWait,
        {"load_shared() of 4 bytes at byte ", "asynchronous copy may still be writing"});
  finds("copying to where another box is read", Fault::kRefillsTooEarly,
        {" bytes at byte ", " of shared memory, which "});
  finds("a tensor map that was not encoded", Fault::kNotEncoded, {"that was not encoded"});

  const auto refused = [&](const char* what, auto change) {
    gpu::TensorMapShape shape = right;
    change(shape);
    gpu::TensorMap other = {};
    const char* reason = gpu::encode_tensor_map(shape, &other);
    check_text(std::string(what) + " is refused", reason == nullptr ? "" : reason, {"tensor map"});
  };
  refused("a matrix at no multiple of 16 bytes", [&](auto& shape) { shape.data = x + 1; });
  refused("a row of no multiple of 16 bytes", [](auto& shape) { shape.row_bytes += 8; });
  refused("a box row of no multiple of 16 bytes", [](auto& shape) { shape.box_columns = 6; });
  refused("a box of too many rows", [](auto& shape) { shape.box_rows = 257; });
  refused("a matrix of no rows", [](auto& shape) { shape.rows = 0; });
  refused("an element of one byte", [](auto& shape) { shape.element_bytes = 1; });

  test_stores(x, right);
}

}  // namespace fastbn::selftest
