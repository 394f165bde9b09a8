// SPDX-License-Identifier: BSD-3-Clause
//
// Blocks of a cluster that store to each other.
#include "selftest.h"

namespace fastbn::selftest {

namespace {

constexpr int kThreads = 64;
constexpr int kBlocks = 4;
constexpr int kRounds = 5;
constexpr int kChannels = 3;

enum class Fault {
  kNone,
  kNoFirstBarrier,
  kOneBarrier,
  kOnePlace,
  kOneThreadDoesNotWait,
  kWaitsInBlock,
  kExpectsTooLittle,
  kExpectsTooMuch,
  kReturnsEarly,
};

// Every block sums what all blocks have, round after round: two numbers to each channel, which go
// to both of them in turn.
FASTBN_KERNEL(kThreads, 1) sum_over_cluster(const float* x, float* y, const Fault fault) {
  using Pair = gpu::Vector<float, 2>;
  auto* barriers = static_cast<gpu::CopyBarrier*>(gpu::shared_memory());
  Pair* places = reinterpret_cast<Pair*>(barriers + 2);
  const int thread = gpu::thread_index();
  const int rank = cudasim::current->block->rank;
  int bytes = kBlocks * kChannels * static_cast<int>(sizeof(Pair));
  if (fault == Fault::kExpectsTooLittle) bytes -= static_cast<int>(sizeof(Pair));
  if (fault == Fault::kExpectsTooMuch) bytes += static_cast<int>(sizeof(Pair));
  if (thread == 0) {
    gpu::init_barrier(barriers, 1);
    gpu::init_barrier(barriers + 1, 1);
  }
  if (fault == Fault::kNoFirstBarrier) {
    gpu::sync_block();
  } else {
    gpu::sync_cluster();
  }
  float sum = 0;
  for (int round = 0; round < kRounds; ++round) {
    const int turn = round % 2;
    gpu::CopyBarrier* barrier = barriers + (fault == Fault::kOneBarrier ? 0 : turn);
    const int parity = fault == Fault::kOneBarrier ? round % 2 : round / 2 % 2;
    Pair* place = places + (fault == Fault::kOnePlace ? 0 : turn) * kBlocks * kChannels;
    if (thread == 0) gpu::expect_bytes(barrier, bytes);
    if (thread < kChannels) {
      const float value =
          gpu::load<gpu::CacheHint::kKeep>(x + (round * kBlocks + rank) * kChannels + thread);
      for (int peer = 0; peer < kBlocks; ++peer) {
        gpu::store_async(place + rank * kChannels + thread, peer, Pair{{value, 1}}, barrier);
      }
    }
    if (fault == Fault::kReturnsEarly && round + 1 == kRounds) {
      gpu::sync_cluster();
      return;
    }
    if (fault == Fault::kWaitsInBlock) {
      gpu::wait_barrier(barrier, parity);
    } else if (fault != Fault::kOneThreadDoesNotWait || thread != 1) {
      gpu::wait_barrier_cluster(barrier, parity);
    }
    if (thread < kChannels) {
      for (int peer = 0; peer < kBlocks; ++peer) {
        const Pair pair = gpu::load_shared(place + peer * kChannels + thread);
        sum += pair.elements[0] * pair.elements[1];
      }
    }
    gpu::sync_block();
  }
  if (thread < kChannels) {
    gpu::store<gpu::CacheHint::kKeep>(y + rank * kChannels + thread, sum);
  }
}

FASTBN_KERNEL(kThreads, 1) store_to_one_that_returns() {
  auto* barrier = static_cast<gpu::CopyBarrier*>(gpu::shared_memory());
  if (gpu::thread_index() == 0) gpu::init_barrier(barrier, 1);
  gpu::sync_cluster();
  if (cudasim::current->block->rank == 0 && gpu::thread_index() == 0) {
    gpu::store_async(reinterpret_cast<float*>(barrier + 1), 1, 1.0f, barrier);
  }
}

}  // namespace

void test_peer_stores() {
  const std::vector<float> x = count_to(kRounds * kBlocks * kChannels);
  std::vector<float> expected(kBlocks * kChannels);
  for (int i = 0; i < static_cast<int>(x.size()); ++i) {
    for (int rank = 0; rank < kBlocks; ++rank) {
      expected[rank * kChannels + i % kChannels] += x[i];
    }
  }
  std::vector<float> y(expected.size());
  show(x, "x");
  lend(y, "y");
  const auto run = [&](Fault fault) {
    const int shared_bytes = 16 + 2 * kBlocks * kChannels * 8;
    return gpu::launch(nullptr, {kBlocks, kThreads, shared_bytes, false, kBlocks}, sum_over_cluster,
                       x.data(), y.data(), fault);
  };
  cudasim::take_report();
  check("stores to peers are right under all seeds",
        seeds_right(expected, y, [&] { return run(Fault::kNone); }) == kSeeds);
  check("blocks have met at one barrier of the cluster",
        cudasim::take_report().launches[0].cluster_barriers == 1);
  const auto finds = [&](const char* what, Fault fault, std::initializer_list<const char*> parts) {
    check(std::string(what) + " is noticed under all seeds",
          seeds_right(expected, y, [&] { return run(fault); }) == 0);
    check_text(std::string(what) + " is reported", faults_of_seeds([&] { return run(fault); }),
               parts);
  };
  finds("a missing first barrier", Fault::kNoFirstBarrier,
        {"store_async() of the barrier at byte 0 of shared memory of block 0, which thread 0 has "
         "initialized with no barrier since"});
  finds("one barrier for all rounds", Fault::kOneBarrier, {"bytes that may count for any phase"});
  finds("one place for all rounds", Fault::kOnePlace,
        {"store_async() of 8 bytes at byte ", "asynchronous copy may still be writing"});
  finds("a thread that does not wait", Fault::kOneThreadDoesNotWait, {" of shared memory"});
  finds("a wait for this block alone", Fault::kWaitsInBlock,
        {"wait_barrier_cluster() lets see that"});
  finds("expecting too few bytes", Fault::kExpectsTooLittle,
        {"blocks of the cluster have stored 8 bytes more than phase 0 of the barrier at byte 0 of "
         "shared memory",
         " expects"});
  finds("expecting too many bytes", Fault::kExpectsTooMuch,
        {"deadlock", "threads wait in wait_barrier_cluster() at ",
         "misses 0 of 1 arrivals and 8 "
         "bytes"});
  finds("returning before all has landed", Fault::kReturnsEarly,
        {"returned while copies to its shared memory may land"});
  check_text("a store to a block that returns is reported", faults_of_seeds([&] {
               return gpu::launch(nullptr, {2, kThreads, 16, false, 2}, store_to_one_that_returns);
             }),
             {"of block 1 of the cluster, of which threads have returned"});
}

}  // namespace fastbn::selftest
