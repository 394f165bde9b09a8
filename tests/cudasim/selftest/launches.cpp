// SPDX-License-Identifier: BSD-3-Clause
//
// What can be launched, what is reported of it, and that a seed fixes everything.
#include "selftest.h"

namespace fastbn::selftest {

FASTBN_KERNEL(1024, 1) two_barriers() {
  gpu::sync_block();
  gpu::allow_next_kernel();
  if (gpu::block_index() == 1) gpu::sync_block();
}

template <typename T>
FASTBN_KERNEL(64, 1)
write_order(unsigned* counter, T* order) {
  for (int round = 0; round < 2; ++round) {
    const unsigned place = gpu::atomic_inc_wrap(counter, ~0u);
    gpu::store<gpu::CacheHint::kKeep>(
        order + place, gpu::block_index() * gpu::block_threads() + gpu::thread_index());
    gpu::sync_block();
  }
}

namespace {

std::vector<int> order_of(uint64_t seed, int blocks_at_once) {
  constexpr int kThreads = 64;
  constexpr int kBlocks = 8;
  std::vector<unsigned> counter(1);
  std::vector<int> order(2 * kThreads * kBlocks);
  cudasim::clear_buffers();
  lend(counter, "counter", cudasim::Kind::kWorkspace);
  lend(order, "order");
  cudasim::device().blocks_at_once = blocks_at_once;
  cudasim::seed(seed);
  gpu::launch(nullptr, {kBlocks, kThreads, 0, false}, write_order<int>, counter.data(),
              order.data());
  return order;
}

std::string fault_of_shape(const gpu::LaunchShape& shape) {
  return fault_of([&] { return gpu::launch(nullptr, shape, two_barriers); });
}

}  // namespace

void test_launches() {
  constexpr int64_t kMostBlocks = 2147483647;
  check_text("no threads", fault_of_shape({1, 0, 0, false}), {"1 to 1024 threads"});
  check_text("too many threads", fault_of_shape({1, 1025, 0, false}), {"1 to 1024 threads"});
  check_text("no blocks", fault_of_shape({0, 32, 0, false}), {"1 to 2147483647 blocks"});
  check_text("too many blocks", fault_of_shape({kMostBlocks + 1, 32, 0, false}),
             {"1 to 2147483647 blocks"});
  check_text("too much shared memory", fault_of_shape({1, 32, 227 * 1024 + 1, false}),
             {"so much shared memory"});
  cudasim::device().shared_per_block = 48 * 1024;
  check_text("a smaller device has less", fault_of_shape({1, 32, 48 * 1024 + 1, false}),
             {"so much shared memory"});
  check_text("too large a cluster", fault_of_shape({34, 32, 0, false, 17}), {"a cluster"});
  check_text("half a cluster", fault_of_shape({12, 32, 0, false, 8}), {"whole clusters"});
  cudasim::device().multiprocessors = 2;
  const std::string too_many = "a cooperative grid has more blocks than fit on the device";
  check("a cooperative grid that fits by threads",
        fault_of_shape({4, 1024, 0, false, 1, true}).empty());
  check("one that does not", fault_of_shape({5, 1024, 0, false, 1, true}) == too_many);
  check("a cooperative grid that fits by shared memory",
        fault_of_shape({8, 32, 48 * 1024, false, 1, true}).empty());
  check("one that does not", fault_of_shape({9, 32, 48 * 1024, false, 1, true}) == too_many);

  cudasim::take_report();
  gpu::launch(nullptr, {6, 96, 512, false, 2}, two_barriers);
  gpu::launch(nullptr, {1, 32, 0, false}, two_barriers);
  const std::vector<cudasim::LaunchReport> launches = cudasim::take_report().launches;
  check("launches are reported in order", launches.size() == 2 && launches[1].blocks == 1);
  check("with their shape", launches[0].blocks == 6 && launches[0].threads == 96 &&
                                launches[0].shared_bytes == 512 &&
                                launches[0].cluster_blocks == 2 && !launches[0].cooperative &&
                                !launches[0].overlaps_previous);
  check("with the barriers of the block that has most",
        launches[0].barriers == 2 && launches[1].barriers == 1);
  check("with what they allow", launches[0].allows_next);
  check("and once", cudasim::take_report().launches.empty());

  check("the same seed gives the same schedule", order_of(7, 1) == order_of(7, 1));
  check("another seed gives another", order_of(7, 1) != order_of(8, 1));
  check("the same with several blocks at once", order_of(7, 3) == order_of(7, 3));
  cudasim::take_report();
  const std::vector<int> order = order_of(7, 1);
  check_text("a kernel is reported by name", cudasim::take_report().launches.at(0).kernel,
             {"fastbn::selftest::write_order<int>"});
}

}  // namespace fastbn::selftest
