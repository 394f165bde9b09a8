// SPDX-License-Identifier: BSD-3-Clause
//
// Within a block: barriers, shared memory, warps. And the last block of a grid.
#include <set>

#include "selftest.h"

namespace fastbn::selftest {

constexpr int kThreads = 128;

// Sums a block's values as a tree; the two barriers of a step can be left out.
FASTBN_KERNEL(kThreads, 1)
block_sum(const float* x, float* y, const bool first, const bool second) {
  float* shared = static_cast<float*>(gpu::shared_memory());
  const int thread = gpu::thread_index();
  float value = gpu::load<gpu::CacheHint::kStream>(x + gpu::block_index() * kThreads + thread);
#pragma unroll
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (thread >= half && thread < 2 * half) shared[thread - half] = value;
    if (first) gpu::sync_block();
    if (thread < half) value += shared[thread];
    if (second) gpu::sync_block();
  }
  if (thread == 0) gpu::store<gpu::CacheHint::kKeep>(y + gpu::block_index(), value);
}

FASTBN_KERNEL(kThreads, 1) warp_sum(const float* x, float* y) {
  const float value = gpu::load<gpu::CacheHint::kStream>(x + gpu::thread_index());
  gpu::Vector<float, 2> sum = {{value, 2 * value}};
  for (int step = gpu::kWarpThreads / 2; step > 0; step /= 2) {
    const auto further = gpu::shuffle_down(sum, step);
    for (int i = 0; i < 2; ++i) sum.elements[i] += further.elements[i];
  }
  gpu::sync_warp();
  const int warp = gpu::thread_index() / gpu::kWarpThreads;
  if (gpu::thread_index() % gpu::kWarpThreads == 0) {
    for (int i = 0; i < 2; ++i) {
      gpu::store<gpu::CacheHint::kKeep>(y + 2 * warp + i, sum.elements[i]);
    }
  }
}

// What a block finds in its shared memory, of which it writes all but the last value.
FASTBN_KERNEL(kThreads, 1) read_unwritten(float* y) {
  float* shared = static_cast<float*>(gpu::shared_memory());
  const int thread = gpu::thread_index();
  if (thread < kThreads - 1) shared[thread] = 1;
  gpu::sync_block();
  gpu::store<gpu::CacheHint::kKeep>(y + thread, shared[thread]);
}

FASTBN_KERNEL(kThreads, 1) write_shared_past_end(const int at) {
  if (gpu::thread_index() == 0) static_cast<float*>(gpu::shared_memory())[at] = 0;
  gpu::sync_block();
}

FASTBN_KERNEL(kThreads, 1) some_return() {
  if (gpu::thread_index() < 100) gpu::sync_block();
}

FASTBN_KERNEL(kThreads, 1) different_barriers() {
  if (gpu::thread_index() < 100) {
    gpu::sync_block();
  } else {
    gpu::sync_block();
  }
}

FASTBN_KERNEL(kThreads, 1) different_kinds_of_barriers() {
  if (gpu::thread_index() % gpu::kWarpThreads < 5) {
    gpu::sync_block();
  } else {
    gpu::sync_warp();
  }
}

// Who fences what the first warp has stored: a thread that meets it at a barrier or does not, every
// thread for itself, or nobody.
enum class Fence { kOneAfterBarrier, kOneBeforeBarrier, kEach, kNone };

// Each block leaves a value; the one that comes last sums them, and says which it is.
FASTBN_KERNEL(kThreads, 1)
last_block_sums(float* partials, unsigned* counter, float* y, const Fence fence) {
  float* shared = static_cast<float*>(gpu::shared_memory());
  const int blocks = gpu::grid_blocks();
  const int thread = gpu::thread_index();
  if (thread == 1) {
    gpu::store<gpu::CacheHint::kKeep>(partials + gpu::block_index(),
                                      static_cast<float>(gpu::block_index()));
  }
  if (fence == Fence::kEach) gpu::fence_device();
  if (fence == Fence::kOneBeforeBarrier && thread == 0) gpu::fence_device();
  gpu::sync_block();
  if (fence == Fence::kOneAfterBarrier && thread == 0) gpu::fence_device();
  if (thread == 0) {
    shared[0] =
        static_cast<float>(gpu::atomic_inc_wrap(counter, static_cast<unsigned>(blocks - 1)));
  }
  gpu::sync_block();
  if (shared[0] != static_cast<float>(blocks - 1)) return;
  gpu::fence_device();
  if (thread != 0) return;
  float total = 0;
  for (int block = 0; block < blocks; ++block) total += gpu::load_coherent(partials + block);
  gpu::store<gpu::CacheHint::kKeep>(y, total);
  gpu::store<gpu::CacheHint::kKeep>(y + 1, static_cast<float>(gpu::block_index()));
}

void test_barriers() {
  constexpr int kBlocks = 3;
  const std::vector<float> x = count_to(kBlocks * kThreads);
  std::vector<float> expected(kBlocks);
  for (int i = 0; i < kBlocks * kThreads; ++i) expected[i / kThreads] += x[i];
  std::vector<float> y(kBlocks);
  show(x, "x");
  lend(y, "y");
  const gpu::LaunchShape shape = {kBlocks, kThreads, kThreads / 2 * 4, false};
  const auto sum_blocks = [&](bool first, bool second) {
    return seeds_right(expected, y, [&] {
      return gpu::launch(nullptr, shape, block_sum, x.data(), y.data(), first, second);
    });
  };
  check("a reduction with its barriers is right under all seeds", sum_blocks(true, true) == kSeeds);
  check("without the first it is not", sum_blocks(false, true) < kSeeds);
  check("without the second it is not", sum_blocks(true, false) < kSeeds);

  std::vector<float> sums(2 * kThreads / gpu::kWarpThreads);
  std::vector<float> expected_sums(sums.size());
  for (int i = 0; i < kThreads; ++i) {
    expected_sums[2 * (i / gpu::kWarpThreads)] += x[i];
    expected_sums[2 * (i / gpu::kWarpThreads) + 1] += 2 * x[i];
  }
  lend(sums, "sums");
  const int right = seeds_right(expected_sums, sums, [&] {
    return gpu::launch(nullptr, {1, kThreads, 0, false}, warp_sum, x.data(), sums.data());
  });
  check("shuffles within warps are right under all seeds", right == kSeeds);
  check_text("a shuffle in half a warp is reported", fault_of([&] {
               return gpu::launch(nullptr, {1, 48, 0, false}, warp_sum, x.data(), sums.data());
             }),
             {"shuffle_down()", "in a warp of 16 threads"});

  std::vector<float> found(kThreads);
  lend(found, "found");
  gpu::launch(nullptr, {1, kThreads, kThreads * 4, false}, read_unwritten, found.data());
  check("shared memory is NaN until it is written",
        found[kThreads - 2] == 1 && std::isnan(found[kThreads - 1]));
#ifndef __SANITIZE_ADDRESS__  // which reports it at once
  const auto write_at = [](int at) {
    return fault_of([&] {
      return gpu::launch(nullptr, {1, kThreads, kThreads * 4, false}, write_shared_past_end, at);
    });
  };
  check("a store to the last of shared memory is fine", write_at(kThreads - 1).empty());
  check_text("a store past the end of shared memory is reported", write_at(kThreads),
             {"block 0 wrote past the 512 bytes of its shared memory"});
  check_text("a store before shared memory is reported", write_at(-1), {"wrote before"});
#endif

  const auto fault_of_kernel = [](void (*kernel)()) {
    return fault_of([&] { return gpu::launch(nullptr, {1, kThreads, 0, false}, kernel); });
  };
  check_text("a barrier that some threads never reach is reported", fault_of_kernel(some_return),
             {"block 0", "returned", "sync_block() at ", "barriers.cpp:"});
  check_text("threads in different barriers are reported", fault_of_kernel(different_barriers),
             {"block 0", "waits in sync_block() at ", "while thread ", "barriers.cpp:"});
  check_text("a deadlock is reported", fault_of_kernel(different_kinds_of_barriers),
             {"deadlock: in block 0, 20 of 128 threads wait in sync_block() at ",
              "108 of 128 threads wait in sync_warp() at "});
  check("the simulator goes on after an error", sum_blocks(true, true) == kSeeds);
}

void test_blocks() {
  constexpr int kBlocks = 37;
  std::vector<float> partials(kBlocks);
  std::vector<unsigned> counter(1);
  std::vector<float> y(2);
  lend(partials, "partials", cudasim::Kind::kWorkspace);
  lend(counter, "counter", cudasim::Kind::kWorkspace);
  lend(y, "y");
  const auto run = [&](Fence fence) {
    counter[0] = 0;
    return gpu::launch(nullptr, {kBlocks, kThreads, 4, false}, last_block_sums, partials.data(),
                       counter.data(), y.data(), fence);
  };
  for (const int at_once : {1, 4}) {
    cudasim::device().blocks_at_once = at_once;
    bool right = true;
    std::set<float> last;
    for (int seed = 0; seed < kSeeds; ++seed) {
      cudasim::seed(static_cast<uint64_t>(seed));
      y.assign(2, NAN);
      run(Fence::kOneAfterBarrier);
      right &= y[0] == sum(count_to(kBlocks)) && counter[0] == 0;
      last.insert(y[1]);
    }
    const std::string times = ", " + std::to_string(at_once) + " at once";
    check("the last block sums all" + times, right);
    check("it is another one under other seeds" + times, last.size() > 2);
  }
  check("each thread may fence for itself", fault_of([&] { return run(Fence::kEach); }).empty());
  for (const Fence fence : {Fence::kNone, Fence::kOneBeforeBarrier}) {
    check_text("a missing fence is reported", fault_of([&] { return run(fence); }),
               {"load_coherent() of 4 bytes at offset ", "'partials'", "no fence_device()"});
  }
}

}  // namespace fastbn::selftest
