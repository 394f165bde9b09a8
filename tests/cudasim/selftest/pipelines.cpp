// SPDX-License-Identifier: BSD-3-Clause
//
// A warp that copies tiles for the others of its block, and barriers by which they wait for each
// other and for nobody else.
#include "selftest.h"

namespace fastbn::selftest {

namespace {

constexpr int kThreads = 128;
constexpr int kConsumers = kThreads - gpu::kWarpThreads;
constexpr int kConsumerWarps = kConsumers / gpu::kWarpThreads;
constexpr int kStages = 2;
constexpr int kTiles = 7;

using Float4 = gpu::Vector<float, 4>;
constexpr int kTileBytes = kConsumers * static_cast<int>(sizeof(Float4));

enum class Fault {
  kNone,
  kOneThreadDoesNotWait,
  kWaitsForFullToFill,
  kArrivesBeforeItReads,
  kOneWarpNeverArrives,
  kArrivesTwice,
  kArrivesWithoutItsWarp,
  kReadsAfterItsLastArrival,
};

// Sums tiles of 4 values a thread. Each stage has a barrier that ends a phase when it is full, and
// one that does when the warps that read it have arrived.
FASTBN_KERNEL(kThreads, 1) sum_pipelined(const float* x, float* y, const Fault fault) {
  auto* full = static_cast<gpu::CopyBarrier*>(gpu::shared_memory());
  auto* empty = full + kStages;
  Float4* stages = reinterpret_cast<Float4*>(empty + kStages);
  const int thread = gpu::thread_index();
  if (thread == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      gpu::init_barrier(full + stage, 1);
      gpu::init_barrier(empty + stage, kConsumerWarps);
    }
  }
  gpu::sync_block();
  if (thread >= kConsumers) {
    if (thread > kConsumers) return;
    for (int tile = 0; tile < kTiles; ++tile) {
      const int stage = tile % kStages;
      // The phase before the first has ended for all to see.
      gpu::wait_barrier((fault == Fault::kWaitsForFullToFill ? full : empty) + stage,
                        1 - tile / kStages % 2);
      gpu::expect_bytes(full + stage, kTileBytes);
      gpu::bulk_copy(stages + stage * kConsumers, x + tile * 4 * kConsumers, kTileBytes,
                     full + stage);
    }
    return;
  }
  const int lane = thread % gpu::kWarpThreads;
  Float4 total = {};
  for (int tile = 0; tile < kTiles; ++tile) {
    const int stage = tile % kStages;
    const auto release = [&] {
      if (fault != Fault::kArrivesWithoutItsWarp) gpu::sync_warp();
      if (lane != 0 || (fault == Fault::kOneWarpNeverArrives && thread == 0)) return;
      gpu::arrive(empty + stage);
      if (fault == Fault::kArrivesTwice) gpu::arrive(empty + stage);
    };
    if (fault != Fault::kOneThreadDoesNotWait || thread != 5) {
      gpu::wait_barrier(full + stage, tile / kStages % 2);
    }
    if (fault == Fault::kArrivesBeforeItReads) release();
    const Float4 values = gpu::load_shared(stages + stage * kConsumers + kConsumers - 1 - thread);
    for (int i = 0; i < 4; ++i) total.elements[i] += values.elements[i];
    if (fault != Fault::kArrivesBeforeItReads) release();
    if (fault == Fault::kReadsAfterItsLastArrival && tile == 2) {
      total.elements[0] += gpu::load_shared(&stages[stage * kConsumers + thread].elements[0]);
    }
  }
  gpu::store<gpu::CacheHint::kStream>(reinterpret_cast<Float4*>(y) + thread, total);
}

// Threads that hand a value on through shared memory, one with an arrival and one without.
FASTBN_KERNEL(kThreads, 1) hand_on(float* y, const bool arrives, const bool waits) {
  auto* barrier = static_cast<gpu::CopyBarrier*>(gpu::shared_memory());
  float* value = reinterpret_cast<float*>(barrier + 1);
  const int thread = gpu::thread_index();
  if (thread == 0) gpu::init_barrier(barrier, 1);
  gpu::sync_block();
  if (thread == kThreads - 1) {
    gpu::store_shared(value, 5.0f);
    if (arrives) gpu::arrive(barrier);
  } else if (thread == 0) {
    if (waits) gpu::wait_barrier(barrier, 0);
    gpu::store<gpu::CacheHint::kKeep>(y, gpu::load_shared(value));
  }
}

}  // namespace

void test_pipelines() {
  const std::vector<float> x = count_to(kTiles * kConsumers * 4);
  std::vector<float> expected(kConsumers * 4);
  for (int tile = 0; tile < kTiles; ++tile) {
    for (int thread = 0; thread < kConsumers; ++thread) {
      for (int i = 0; i < 4; ++i) {
        expected[thread * 4 + i] += x[(tile * kConsumers + kConsumers - 1 - thread) * 4 + i];
      }
    }
  }
  std::vector<float> y(expected.size());
  show(x, "x");
  lend(y, "y");
  const auto run = [&](Fault fault) {
    return gpu::launch(nullptr, {1, kThreads, 2 * kStages * 8 + kStages * kTileBytes},
                       sum_pipelined, x.data(), y.data(), fault);
  };
  check("a pipeline is right under all seeds",
        seeds_right(expected, y, [&] { return run(Fault::kNone); }) == kSeeds);
  const auto finds = [&](const char* what, Fault fault, std::initializer_list<const char*> parts) {
    check(std::string(what) + " is noticed under all seeds",
          seeds_right(expected, y, [&] { return run(fault); }) == 0);
    check_text(std::string(what) + " is reported", faults_of_seeds([&] { return run(fault); }),
               parts);
  };
  finds("reading a stage without waiting for it", Fault::kOneThreadDoesNotWait,
        {"load_shared() of 16 bytes at byte ", "asynchronous copy may still be writing"});
  finds("filling a stage that may still be read", Fault::kWaitsForFullToFill,
        {"load_shared() of 16 bytes at byte ", "asynchronous copy may still be writing"});
  finds("reading a stage after releasing it", Fault::kArrivesBeforeItReads,
        {"bulk_copy() of 1536 bytes at byte ", " has read, with no barrier since"});
  finds("releasing a stage for lanes that may still read", Fault::kArrivesWithoutItsWarp,
        {"bulk_copy() of 1536 bytes at byte 32 of shared memory, which thread ",
         " has read, with no barrier since"});
  finds("reading a stage once more", Fault::kReadsAfterItsLastArrival,
        {"bulk_copy() of 1536 bytes at byte ", " has read, with no barrier since"});
  finds("a warp that never arrives", Fault::kOneWarpNeverArrives,
        {"deadlock", "1 of 128 threads wait in wait_barrier() at ", "pipelines.cpp:",
         "for phase 0 of the barrier at byte 16 of shared memory, which misses 1 of 3 arrivals"});
  check("an arrival too many is noticed under all seeds",
        seeds_right(expected, y, [&] { return run(Fault::kArrivesTwice); }) == 0);

  std::vector<float> value(1);
  lend(value, "value");
  const auto hand = [&](bool arrives, bool waits) {
    return gpu::launch(nullptr, {1, kThreads, 16}, hand_on, value.data(), arrives, waits);
  };
  check("one thread can wait for another",
        seeds_right({5.0f}, value, [&] { return hand(true, true); }) == kSeeds);
  check_text("for one that never arrives it waits for ever",
             fault_of([&] { return hand(false, true); }),
             {"deadlock", "which misses 1 of 1 arrivals and 0 bytes"});
  check_text(
      "reading what another thread writes without waiting is reported",
      faults_of_seeds([&] { return hand(true, false); }),
      {"load_shared() of 4 bytes at byte 8 of shared memory, which thread 127 wrote, with no "
       "barrier since"});
}

}  // namespace fastbn::selftest
