// SPDX-License-Identifier: BSD-3-Clause
//
// Bulk stores from shared to global memory.
#include "selftest.h"

namespace fastbn::selftest {

namespace {

constexpr int kThreads = 64;
constexpr int kStages = 2;
constexpr int kTiles = 7;

using Float4 = gpu::Vector<float, 4>;
constexpr int kTileBytes = kThreads * static_cast<int>(sizeof(Float4));

enum class Fault {
  kNone,
  kNoFence,
  kOneFenceAfterBarrier,
  kNoBarrier,
  kRefillsTooEarly,
  kNoCommit,
  kOverwrites,
  kReturnsEarly,
  kPlainStore,
  kMisaligned,
  kPastTheEnd,
};

// Doubles tiles where they lie in shared memory, and lets them be stored from there.
FASTBN_KERNEL(kThreads, 1) double_in_place(const float* x, float* y, const Fault fault) {
  auto* full = static_cast<gpu::CopyBarrier*>(gpu::shared_memory());
  Float4* stages = reinterpret_cast<Float4*>(full + kStages);
  const int thread = gpu::thread_index();
  const auto fill = [&](int tile) {
    const int stage = tile % kStages;
    gpu::expect_bytes(full + stage, kTileBytes);
    gpu::bulk_copy(stages + stage * kThreads, x + tile * 4 * kThreads, kTileBytes, full + stage);
  };
  if (thread == 0) {
    for (int stage = 0; stage < kStages; ++stage) gpu::init_barrier(full + stage, 1);
  }
  gpu::sync_block();
  if (thread == 0) fill(0);
  for (int tile = 0; tile < kTiles; ++tile) {
    const int stage = tile % kStages;
    // The next tile goes where the last but this one is stored from.
    if (thread == 0 && tile + 1 < kTiles) {
      if (fault != Fault::kRefillsTooEarly) {
        gpu::wait_bulk_stores_read<0>();
      }
      fill(tile + 1);
    }
    gpu::wait_barrier(full + stage, tile / kStages % 2);
    Float4* own = stages + stage * kThreads + thread;
    Float4 values = gpu::load_shared(own);
    for (float& element : values.elements) element *= 2;
    if (fault == Fault::kPlainStore && thread == 3) {
      *own = values;
    } else {
      gpu::store_shared(own, values);
    }
    if (fault != Fault::kNoFence && fault != Fault::kOneFenceAfterBarrier) {
      gpu::fence_async_proxy();
    }
    if (fault != Fault::kNoBarrier) gpu::sync_block();
    if (thread == 0) {
      if (fault == Fault::kOneFenceAfterBarrier) gpu::fence_async_proxy();
      const int past = fault == Fault::kPastTheEnd && tile + 1 == kTiles ? 4 : 0;
      gpu::bulk_store(y + tile * 4 * kThreads + past + (fault == Fault::kMisaligned ? 1 : 0),
                      stages + stage * kThreads, kTileBytes);
      if (fault != Fault::kNoCommit) gpu::commit_bulk_stores();
      if (fault == Fault::kOverwrites) gpu::store_shared(&own->elements[0], 0.0f);
    }
  }
  if (thread == 0 && fault != Fault::kReturnsEarly) gpu::wait_bulk_stores_read<0>();
}

// Reads back what it has stored.
FASTBN_KERNEL(kThreads, 1) read_back(float* y) {
  auto* shared = static_cast<Float4*>(gpu::shared_memory());
  if (gpu::thread_index() != 0) return;
  gpu::store_shared(shared, Float4{{1, 2, 3, 4}});
  gpu::fence_async_proxy();
  gpu::bulk_store(y, shared, 16);
  gpu::commit_bulk_stores();
  gpu::wait_bulk_stores_read<0>();
  gpu::store<gpu::CacheHint::kKeep>(y + 7, gpu::load_coherent(y + 2));
}

}  // namespace

void test_bulk_stores() {
  const std::vector<float> x = count_to(kTiles * kThreads * 4);
  std::vector<float> expected;
  for (const float value : x) expected.push_back(2 * value);
  std::vector<float> y(expected.size());
  show(x, "x");
  lend(y, "y");
  const auto run = [&](Fault fault) {
    return gpu::launch(nullptr, {1, kThreads, 16 + kStages * kTileBytes}, double_in_place, x.data(),
                       y.data(), fault);
  };
  cudasim::take_report();
  check("bulk stores are right under all seeds",
        seeds_right(expected, y, [&] { return run(Fault::kNone); }) == kSeeds);
  const cudasim::Traffic traffic = cudasim::take_report().launches[0].total();
  check("they are counted", traffic.bulk_stores == kTiles &&
                                traffic.bulk_stored_bytes == kTiles * kTileBytes &&
                                traffic.written_bytes() == kTiles * kTileBytes);
  const auto finds = [&](const char* what, Fault fault, std::initializer_list<const char*> parts) {
    check(std::string(what) + " is noticed under all seeds",
          seeds_right(expected, y, [&] { return run(fault); }) == 0);
    check_text(std::string(what) + " is reported", faults_of_seeds([&] { return run(fault); }),
               parts);
  };
  finds("a missing fence", Fault::kNoFence,
        {"bulk_store() of 1024 bytes at byte 16 of shared memory, which thread ",
         " wrote, with no fence_async_proxy() and barrier after it since"});
  finds("a fence of the wrong thread", Fault::kOneFenceAfterBarrier,
        {" wrote, with no fence_async_proxy() and barrier after it since"});
  finds("a missing barrier", Fault::kNoBarrier,
        {"bulk_store() of 1024 bytes at byte 16 of shared memory, "});
  finds("filling what a bulk store reads", Fault::kRefillsTooEarly,
        {"bulk_copy() of 1024 bytes at byte 16 of shared memory, which a bulk store may still be "
         "reading: no wait_bulk_stores_read() and barrier since"});
  finds("a wait for stores that were not committed", Fault::kNoCommit,
        {"which a bulk store may still be reading"});
  finds("writing what a bulk store reads", Fault::kOverwrites,
        {"store_shared() of 4 bytes at byte 16 of shared memory, which a bulk store may still be "
         "reading"});
  finds("returning before all is read", Fault::kReturnsEarly,
        {"thread 0: returned while bulk stores may still be reading"});
  finds("storing what was written by other means", Fault::kPlainStore,
        {"bulk_store() of 1024 bytes at byte 16 of shared memory, not all of which a "
         "store_shared() wrote"});
  finds("a misaligned bulk store", Fault::kMisaligned,
        {"bulk_store() of 1024 bytes at offset 4 of buffer 'y'", "not at a multiple of 16"});
  finds("a bulk store out of bounds", Fault::kPastTheEnd, {"bulk_store()", "is out of bounds"});

  std::vector<float> back(8);
  lend(back, "back");
  check_text("what a bulk store may still be writing cannot be read back", fault_of([&] {
               return gpu::launch(nullptr, {1, kThreads, 16}, read_back, back.data());
             }),
             {"load_coherent() of 4 bytes at offset 8 of buffer 'back'", "or a bulk store"});
}

}  // namespace fastbn::selftest
