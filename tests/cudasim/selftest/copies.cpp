// SPDX-License-Identifier: BSD-3-Clause
//
// Asynchronous copies from global to shared memory.
#include "selftest.h"

namespace fastbn::selftest {

constexpr int kThreads = 64;
constexpr int kStages = 2;
constexpr int kTiles = 7;

using Float4 = gpu::Vector<float, 4>;

// Adds up tiles of 4 values a thread, of which kStages are on their way, with a barrier for each
// stage. The wait can be left out, and so can the barrier that protects a stage that is read.
FASTBN_KERNEL(kThreads, 1)
sum_tiles_by_threads(const float* x, float* y, const bool waits, const bool protects) {
  auto* barriers = static_cast<gpu::CopyBarrier*>(gpu::shared_memory());
  Float4* shared = reinterpret_cast<Float4*>(barriers + kStages);
  const Float4* tiles = reinterpret_cast<const Float4*>(x);
  const int thread = gpu::thread_index();
  const auto fetch = [&](int tile) {
    if (tile >= kTiles) return;
    const int stage = tile % kStages;
    gpu::copy_async(shared + stage * kThreads + thread, tiles + tile * kThreads + thread);
    gpu::arrive_when_copied(barriers + stage);
  };
  if (thread == 0) {
    for (int stage = 0; stage < kStages; ++stage) gpu::init_barrier(barriers + stage, kThreads);
  }
  gpu::sync_block();
  for (int tile = 0; tile < kStages; ++tile) fetch(tile);
  Float4 total = {};
  for (int tile = 0; tile < kTiles; ++tile) {
    const int stage = tile % kStages;
    if (waits) gpu::wait_barrier(barriers + stage, tile / kStages % 2);
    // Of a thread of another warp, so that the barriers matter.
    const Float4 values = shared[stage * kThreads + kThreads - 1 - thread];
    for (int i = 0; i < 4; ++i) total.elements[i] += values.elements[i];
    if (protects) gpu::sync_block();
    fetch(tile + kStages);
  }
  gpu::store<gpu::CacheHint::kStream>(reinterpret_cast<Float4*>(y) + thread, total);
}

enum class Fault {
  kNone,
  kNoWait,
  kNoInit,
  kTooFewBytes,
  kTooManyBytes,
  kMisaligned,
  kOverwritten
};

// The same by bulk copies, and a barrier for each stage.
FASTBN_KERNEL(kThreads, 1) sum_tiles_in_bulk(const float* x, float* y, const Fault fault) {
  auto* barriers = static_cast<gpu::CopyBarrier*>(gpu::shared_memory());
  Float4* shared = reinterpret_cast<Float4*>(barriers + kStages);
  constexpr int kTileBytes = kThreads * sizeof(Float4);
  const int thread = gpu::thread_index();
  const auto fetch = [&](int tile) {
    if (tile >= kTiles || thread != 0) return;
    const int stage = tile % kStages;
    const int surplus = fault == Fault::kTooFewBytes ? -16 : fault == Fault::kTooManyBytes ? 16 : 0;
    gpu::expect_bytes(barriers + stage, kTileBytes + surplus);
    // Two copies, which may land in any order.
    for (int half = 0; half < 2; ++half) {
      const int at = half * kThreads / 2;
      gpu::bulk_copy(shared + stage * kThreads + at,
                     x + 4 * (tile * kThreads + at) + (fault == Fault::kMisaligned ? 1 : 0),
                     kTileBytes / 2, barriers + stage);
    }
  };
  if (thread == 0 && fault != Fault::kNoInit) {
    for (int stage = 0; stage < kStages; ++stage) gpu::init_barrier(barriers + stage, 1);
  }
  gpu::sync_block();
  for (int tile = 0; tile < kStages; ++tile) fetch(tile);
  if (fault == Fault::kOverwritten) barriers[0].state = 0;
  Float4 total = {};
  for (int tile = 0; tile < kTiles; ++tile) {
    const int stage = tile % kStages;
    if (fault != Fault::kNoWait) gpu::wait_barrier(barriers + stage, tile / kStages % 2);
    const Float4 values = shared[stage * kThreads + kThreads - 1 - thread];
    for (int i = 0; i < 4; ++i) total.elements[i] += values.elements[i];
    gpu::sync_block();
    fetch(tile + kStages);
  }
  gpu::store<gpu::CacheHint::kStream>(reinterpret_cast<Float4*>(y) + thread, total);
}

// Writes to where a copy is going to land, or leaves without waiting for it, or arrives twice.
FASTBN_KERNEL(kThreads, 1)
misuse_copy(const float* x, const bool stores, const bool arrives, const bool again) {
  auto* barrier = static_cast<gpu::CopyBarrier*>(gpu::shared_memory());
  Float4* shared = reinterpret_cast<Float4*>(barrier + 2);
  const int thread = gpu::thread_index();
  if (thread == 0) gpu::init_barrier(barrier, kThreads);
  gpu::sync_block();
  gpu::copy_async(shared + thread, reinterpret_cast<const Float4*>(x) + thread);
  if (arrives) gpu::arrive_when_copied(barrier);
  if (again) gpu::arrive_when_copied(barrier);
  gpu::sync_block();
  if (stores) shared[thread].elements[0] = 1;
  if (arrives) gpu::wait_barrier(barrier, 0);
}

void test_copies() {
  const std::vector<float> x = count_to(kTiles * kThreads * 4);
  std::vector<float> expected(kThreads * 4);
  for (int tile = 0; tile < kTiles; ++tile) {
    for (int thread = 0; thread < kThreads; ++thread) {
      for (int i = 0; i < 4; ++i) {
        expected[thread * 4 + i] += x[(tile * kThreads + kThreads - 1 - thread) * 4 + i];
      }
    }
  }
  std::vector<float> y(expected.size());
  show(x, "x");
  lend(y, "y");

  constexpr int kTileBytes = kThreads * 16;
  const auto right_by_threads = [&](bool waits, bool protects) {
    return seeds_right(expected, y, [&] {
      return gpu::launch(nullptr, {1, kThreads, kStages * (8 + kTileBytes), false},
                         sum_tiles_by_threads, x.data(), y.data(), waits, protects);
    });
  };
  check("copies by threads are right under all seeds", right_by_threads(true, true) == kSeeds);
  const cudasim::Traffic traffic = cudasim::take_report().launches[0].total();
  check("they are counted",
        traffic.loads[4] == kTiles * kThreads && traffic.read_bytes() == kTiles * kTileBytes);
  check("without the wait they never land", right_by_threads(false, true) == 0);
  check("into a stage that is still read they go wrong", right_by_threads(true, false) < kSeeds);
  const auto misuse = [&](bool stores, bool arrives, bool again) {
    return fault_of([&] {
      return gpu::launch(nullptr, {1, kThreads, 16 + kTileBytes, false}, misuse_copy, x.data(),
                         stores, arrives, again);
    });
  };
  check_text("a store to where a copy will land is reported", misuse(true, true, false),
             {"was written before the copy had landed"});
  check_text("a copy that nobody waits for is reported", misuse(false, false, false),
             {"returned while copies to its shared memory may land"});
  check_text("an arrival too many is reported", misuse(false, true, true),
             {"arrive_when_copied() once more than the barrier has arrivals"});

  const auto sum_in_bulk = [&](Fault fault) {
    return gpu::launch(nullptr, {1, kThreads, kStages * (8 + kTileBytes), false}, sum_tiles_in_bulk,
                       x.data(), y.data(), fault);
  };
  const auto fault_in_bulk = [&](Fault fault) {
    return fault_of([&] { return sum_in_bulk(fault); });
  };
  cudasim::take_report();
  check("bulk copies are right under all seeds",
        seeds_right(expected, y, [&] { return sum_in_bulk(Fault::kNone); }) == kSeeds);
  const cudasim::Traffic bulk_traffic = cudasim::take_report().launches[0].total();
  check("they are counted", bulk_traffic.bulk_copies == 2 * kTiles && bulk_traffic.loads[4] == 0 &&
                                bulk_traffic.read_bytes() == kTiles * kTileBytes);
  check("without the wait they never land",
        seeds_right(expected, y, [&] { return sum_in_bulk(Fault::kNoWait); }) == 0);
  check_text("a barrier that was not initialised is reported", fault_in_bulk(Fault::kNoInit),
             {"of a barrier that init_barrier() was not called for"});
  check_text("a barrier that was written over is reported", fault_in_bulk(Fault::kOverwritten),
             {"of a barrier that was written over"});
  check_text("expecting too many bytes is a deadlock", fault_in_bulk(Fault::kTooManyBytes),
             {"deadlock", "64 of 64 threads wait in wait_barrier() at ", "copies.cpp:"});
  check_text("expecting too few bytes is one too", fault_in_bulk(Fault::kTooFewBytes),
             {"deadlock", "wait_barrier()"});
  check_text("a misaligned bulk copy is reported", fault_in_bulk(Fault::kMisaligned),
             {"bulk_copy() of 512 bytes at offset ", "is not at a multiple of 16"});
}

}  // namespace fastbn::selftest
