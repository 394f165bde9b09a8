// SPDX-License-Identifier: BSD-3-Clause
//
// Copies of boxes of a matrix.
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

}  // namespace

void test_tensor_maps() {
  constexpr int kBlocks = 2;
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
  check("they are counted",
        traffic.bulk_copies == kBlocks * 3 && traffic.read_bytes() == kRows * kColumns * 4);
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
}

}  // namespace fastbn::selftest
