// SPDX-License-Identifier: BSD-3-Clause
//
// Blocks that live at once: clusters and cooperative grids.
#include "selftest.h"

namespace fastbn::selftest {

constexpr int kThreads = 64;

// Where a block of the cluster has what the calling block has at `own`.
template <typename T>
T* peer_shared(T* own, int rank) {
  return static_cast<T*>(cudasim::peer_shared(own, rank));
}

// Every block of a cluster sums the shared memory of all, and writes the sum. The barriers before
// and after that can be left out.
FASTBN_KERNEL(kThreads, 1)
cluster_sum(const float* x, float* y, const bool first, const bool last) {
  float* shared = static_cast<float*>(gpu::shared_memory());
  const int thread = gpu::thread_index();
  const int i = gpu::block_index() * kThreads + thread;
  shared[thread] = gpu::load<gpu::CacheHint::kStream>(x + i);
  if (first) gpu::sync_cluster();
  float total = 0;
  for (int rank = 0; rank < cudasim::shape.cluster_blocks; ++rank) {
    total += *peer_shared(shared + thread, rank);
  }
  if (last) gpu::sync_cluster();
  gpu::store<gpu::CacheHint::kStream>(y + i, total);
}

// Writes to the next block of the cluster, which may not have started.
FASTBN_KERNEL(kThreads, 1) write_to_next(float* y, const bool starts) {
  float* shared = static_cast<float*>(gpu::shared_memory());
  const int next = (cudasim::current->block->rank + 1) % cudasim::shape.cluster_blocks;
  if (starts) gpu::sync_cluster();
  if (gpu::thread_index() == 0) *peer_shared(shared, next) = 1;
  gpu::sync_cluster();
  if (gpu::thread_index() == 0) {
    gpu::store<gpu::CacheHint::kKeep>(y + gpu::block_index(), *shared);
  }
}

FASTBN_KERNEL(kThreads, 1) wrong_peer(const int rank, const int at) {
  peer_shared(static_cast<float*>(gpu::shared_memory()) + at, rank);
}

// Every block writes the sum of what all blocks have left, after a barrier across the grid for
// `arrivals` blocks, at whose end one thread `acquires`.
FASTBN_KERNEL(kThreads, 1)
grid_sum(float* partials, unsigned* counter, float* y, const unsigned arrivals,
         const bool acquires) {
  const int block = gpu::block_index();
  if (gpu::thread_index() == 0) {
    gpu::store<gpu::CacheHint::kKeep>(partials + block, static_cast<float>(block));
    gpu::add_acq_rel(counter, 1);
    while (gpu::load_relaxed(counter) < arrivals) {
    }
    if (acquires) gpu::load_acquire(counter);
  }
  gpu::sync_block();
  if (gpu::thread_index() != 1) return;
  float total = 0;
  for (int i = 0; i < gpu::grid_blocks(); ++i) total += gpu::load_coherent(partials + i);
  gpu::store<gpu::CacheHint::kKeep>(y + block, total);
}

namespace {

void test_cluster_of(int cluster_blocks) {
  const int blocks = 3 * cluster_blocks;
  const std::vector<float> x = count_to(blocks * kThreads);
  std::vector<float> expected(x.size());
  const int cluster_threads = cluster_blocks * kThreads;
  for (int i = 0; i < static_cast<int>(x.size()); ++i) {
    const int first = i / cluster_threads * cluster_threads;
    for (int rank = 0; rank < cluster_blocks; ++rank) {
      expected[static_cast<size_t>(first + rank * kThreads + i % kThreads)] +=
          x[static_cast<size_t>(i)];
    }
  }
  std::vector<float> y(x.size());
  cudasim::clear_buffers();
  show(x, "x");
  lend(y, "y");
  const gpu::LaunchShape shape = {blocks, kThreads, kThreads * 4, false, cluster_blocks};
  const auto right = [&](bool first, bool last) {
    return seeds_right(expected, y, [&] {
      return gpu::launch(nullptr, shape, cluster_sum, x.data(), y.data(), first, last);
    });
  };
  const std::string of = " over " + std::to_string(cluster_blocks) + " blocks";
  check("a cluster's sum" + of + " is right under all seeds", right(true, true) == kSeeds);
  check("without the barrier before it is not", right(false, true) < kSeeds);
  check("without the barrier after it is not", right(true, false) < kSeeds);
  cudasim::device().blocks_at_once = 2;
  check("two clusters at once are right", right(true, true) == kSeeds);
  cudasim::device().blocks_at_once = 1;
}

}  // namespace

void test_clusters() {
  test_cluster_of(8);
  test_cluster_of(16);
  cudasim::take_report();

  std::vector<float> y(8);
  lend(y, "y");
  const gpu::LaunchShape shape = {8, kThreads, kThreads * 4, false, 4};
  const auto right = [&](bool starts) {
    return seeds_right(std::vector<float>(8, 1.0f), y, [&] {
      return gpu::launch(nullptr, shape, write_to_next, y.data(), starts);
    });
  };
  check("a block that has started can be written to", right(true) == kSeeds);
  check("cluster barriers are counted", cudasim::take_report().launches[0].cluster_barriers == 2);
  check("what is written to one that has not is lost", right(false) < kSeeds);

  const auto fault_of_peer = [&](int rank, int at) {
    return fault_of([&] { return gpu::launch(nullptr, shape, wrong_peer, rank, at); });
  };
  check_text("a peer outside the cluster is reported", fault_of_peer(4, 0),
             {"peer_shared() of block 4 in a cluster of 4"});
  check_text("an address outside shared memory is reported", fault_of_peer(0, kThreads + 1),
             {"outside the block's shared memory"});
}

void test_grids() {
  constexpr int kBlocks = 12;
  std::vector<float> partials(kBlocks);
  std::vector<unsigned> counter(1);
  std::vector<float> y(kBlocks);
  lend(partials, "partials", cudasim::Kind::kWorkspace);
  lend(counter, "counter", cudasim::Kind::kWorkspace);
  lend(y, "y");
  const std::vector<float> expected(kBlocks, sum(count_to(kBlocks)));
  const auto run = [&](bool cooperative, unsigned arrivals, bool acquires = true) {
    counter[0] = 0;
    partials.assign(kBlocks, NAN);
    return gpu::launch(nullptr, {kBlocks, kThreads, 0, false, 1, cooperative}, grid_sum,
                       partials.data(), counter.data(), y.data(), arrivals, acquires);
  };
  check("a barrier across a cooperative grid is right under all seeds",
        seeds_right(expected, y, [&] { return run(true, kBlocks); }) == kSeeds);
  check("for one block too few it is not",
        seeds_right(expected, y, [&] { return run(true, kBlocks - 1); }) < kSeeds);
  check_text("for one block too many it never ends",
             fault_of([&] { return run(true, kBlocks + 1); }),
             {"deadlock", "1 of 64 threads wait in load_relaxed() at ",
              "groups.cpp:", "63 of 64 threads wait in sync_block() at "});
  check_text("in a grid that is not cooperative it never ends",
             fault_of([&] { return run(false, kBlocks); }), {"deadlock", "load_relaxed()"});
  check_text("what others wrote is not visible by a relaxed load of a counter",
             fault_of([&] { return run(true, kBlocks, /*acquires=*/false); }),
             {"'partials'", "after load_relaxed() with no load_acquire() since"});
  check("the simulator goes on after that",
        seeds_right(expected, y, [&] { return run(true, kBlocks); }) == kSeeds);
}

}  // namespace fastbn::selftest
