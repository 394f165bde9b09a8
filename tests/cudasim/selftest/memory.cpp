// SPDX-License-Identifier: BSD-3-Clause
//
// Global memory: what is reported of a wrong access, and what is counted of right ones.
#include "selftest.h"

namespace fastbn::selftest {

struct Pointers {
  const float* x;
  float* y;
};

using Float4 = gpu::Vector<float, 4>;

constexpr int kThreads = 32;
constexpr int kBlocks = 4;

FASTBN_KERNEL(kThreads, 1) shifted_copy(FASTBN_PARAMETER Pointers p, const int shift) {
  const int i = gpu::block_index() * kThreads + gpu::thread_index();
  gpu::store<gpu::CacheHint::kStream>(p.y + i, gpu::load<gpu::CacheHint::kStream>(p.x + i + shift));
}

FASTBN_KERNEL(kThreads, 1) wide_load(FASTBN_PARAMETER Pointers p) {
  const auto value =
      gpu::load<gpu::CacheHint::kKeep>(reinterpret_cast<const Float4*>(p.x + gpu::thread_index()));
  gpu::store<gpu::CacheHint::kKeep>(p.y, value.elements[0]);
}

FASTBN_KERNEL(kThreads, 1) load_after_store(FASTBN_PARAMETER Pointers p, const bool coherent) {
  gpu::store<gpu::CacheHint::kKeep>(p.y, 1.0f);
  const float back = coherent ? gpu::load_coherent(p.y) : gpu::load<gpu::CacheHint::kKeep>(p.y);
  gpu::store<gpu::CacheHint::kKeep>(p.y + 1, back);
}

// Waits for the previous kernel before or after it reads what that one wrote, or never.
enum class Wait { kBefore, kAfter, kNever };
FASTBN_KERNEL(kThreads, 1) overlapping(FASTBN_PARAMETER Pointers p, const Wait wait) {
  const float x = gpu::load<gpu::CacheHint::kKeep>(p.x);
  if (wait == Wait::kBefore) gpu::wait_for_previous_kernel();
  if (wait != Wait::kNever) gpu::store<gpu::CacheHint::kKeep>(p.y, x + gpu::load_coherent(p.y + 1));
  if (wait == Wait::kAfter) gpu::wait_for_previous_kernel();
}

// Per thread: 3 loads of 16 bytes, 2 of 4 and 1 of 2; a store of 8 bytes and, by one, of 2.
FASTBN_KERNEL(kThreads, 1)
mixed_sizes(FASTBN_PARAMETER Pointers p, const BFloat16* weight, BFloat16* mean,
            unsigned* counter) {
  const int i = gpu::block_index() * kThreads + gpu::thread_index();
  const auto* x4 = reinterpret_cast<const Float4*>(p.x);
  float total = 0;
  for (int repeat = 0; repeat < 3; ++repeat) {
    total += gpu::load<gpu::CacheHint::kStream>(x4 + i % kThreads).elements[repeat];
  }
  for (int repeat = 0; repeat < 2; ++repeat) total += gpu::load<gpu::CacheHint::kKeep>(p.x + i);
  total += gpu::widen(gpu::load<gpu::CacheHint::kKeep>(weight));
  const gpu::Vector<float, 2> pair = {{total, total}};
  gpu::store<gpu::CacheHint::kStream>(reinterpret_cast<gpu::Vector<float, 2>*>(p.y) + i % 64, pair);
  if (i == 0) gpu::store<gpu::CacheHint::kKeep>(mean, BFloat16{0});
  gpu::atomic_inc_wrap(counter, 1000);
}

namespace {

void test_counts() {
  const std::vector<float> x = count_to(kBlocks * kThreads);
  std::vector<float> y(x.size());
  const std::vector<BFloat16> weight(1);
  std::vector<BFloat16> mean(1);
  std::vector<unsigned> counter(1);
  show(x, "x");
  lend(y, "y");
  show(weight, "weight", cudasim::Kind::kVector);
  lend(mean, "mean", cudasim::Kind::kVector);
  lend(counter, "counter", cudasim::Kind::kWorkspace);
  gpu::launch(nullptr, {kBlocks, kThreads, 0, false}, mixed_sizes, Pointers{x.data(), y.data()},
              weight.data(), mean.data(), counter.data());

  constexpr int64_t kAll = kBlocks * kThreads;
  const cudasim::Report report = cudasim::take_report();
  const cudasim::Traffic activations = report.of(cudasim::Kind::kActivation);
  const cudasim::Traffic vectors = report.of(cudasim::Kind::kVector);
  const cudasim::Traffic workspace = report.of(cudasim::Kind::kWorkspace);
  using Histogram = std::array<int64_t, 5>;
  check("loads of activations are counted by size",
        activations.loads == Histogram{0, 0, 2 * kAll, 0, 3 * kAll});
  check("stores to activations are counted by size",
        activations.stores == Histogram{0, 0, 0, kAll, 0});
  check("bytes of activations are counted", activations.read_bytes() == kAll * (3 * 16 + 2 * 4) &&
                                                activations.written_bytes() == kAll * 8);
  check("accesses to vectors are counted apart",
        vectors.loads == Histogram{0, kAll, 0, 0, 0} && vectors.stores == Histogram{0, 1, 0, 0, 0});
  check("atomics are counted",
        workspace.atomics == kAll && workspace.read_bytes() == 0 && report.total().atomics == kAll);
  check("the counter has them all", counter[0] == kAll);
}

}  // namespace

void test_memory() {
  const std::vector<float> x = count_to(kBlocks * kThreads);
  std::vector<float> y(x.size());
  show(x, "x");
  lend(y, "y");
  const Pointers pointers = {x.data(), y.data()};
  const gpu::LaunchShape shape = {kBlocks, kThreads, 0, false};
  const gpu::LaunchShape one_block = {1, kThreads, 0, false};

  gpu::launch(nullptr, shape, shifted_copy, pointers, 0);
  check("a copy copies", x == y);
  check_text("a load past the end is reported",
             fault_of([&] { return gpu::launch(nullptr, shape, shifted_copy, pointers, 1); }),
             {"block 3, thread 31: load() of 4 bytes at offset 512 of buffer 'x' of 512 bytes is "
              "out of bounds"});
  check_text("a load before the beginning is reported",
             fault_of([&] { return gpu::launch(nullptr, shape, shifted_copy, pointers, -1); }),
             {"block 0, thread 0: load() of 4 bytes at offset -4 of buffer 'x'", "out of bounds"});
  check_text("a misaligned load of 16 bytes is reported",
             fault_of([&] { return gpu::launch(nullptr, one_block, wide_load, pointers); }),
             {"thread", "load() of 16 bytes", "is not at a multiple of 16"});
  const Pointers swapped = {y.data(), const_cast<float*>(x.data())};
  check_text("a store to a read-only buffer is reported",
             fault_of([&] { return gpu::launch(nullptr, shape, shifted_copy, swapped, 0); }),
             {"store() of 4 bytes", "of buffer 'x'", "which is read-only"});
  check_text("a load of what the kernel has written is reported", fault_of([&] {
               return gpu::launch(nullptr, one_block, load_after_store, pointers, false);
             }),
             {"load() of 4 bytes", "'y'", "which this kernel has written"});
  check("unless it is load_coherent()", fault_of([&] {
                                          return gpu::launch(nullptr, one_block, load_after_store,
                                                             pointers, true);
                                        }).empty());

  const gpu::LaunchShape overlaps = {1, kThreads, 0, true};
  check("an overlapping kernel may wait and write",
        fault_of([&] {
          return gpu::launch(nullptr, overlaps, overlapping, pointers, Wait::kBefore);
        }).empty());
  check_text("an overlapping kernel that waits too late is reported", fault_of([&] {
               return gpu::launch(nullptr, overlaps, overlapping, pointers, Wait::kAfter);
             }),
             {"'y'", "which the previous kernel may be writing"});
  check_text("an overlapping kernel that never waits is reported", fault_of([&] {
               return gpu::launch(nullptr, overlaps, overlapping, pointers, Wait::kNever);
             }),
             {"never waited"});

  cudasim::clear_buffers();
  check_text("an access without buffers is reported",
             fault_of([&] { return gpu::launch(nullptr, shape, shifted_copy, pointers, 0); }),
             {"no buffer is registered"});
  cudasim::take_report();
  test_counts();
}

}  // namespace fastbn::selftest
