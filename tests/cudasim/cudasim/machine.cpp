// SPDX-License-Identifier: BSD-3-Clause
//
// The scheduler: which blocks live, which thread runs, and what is reported of a launch.
#include "machine.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <numeric>
#include <tuple>
#include <utility>

#include "memory.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace fastbn::cudasim {

LaunchShape shape;
Thread* current = nullptr;

namespace {

constexpr int kMostThreads = 1024;  // of a block
constexpr int64_t kMostBlocks = 2147483647;
constexpr int kReservedShared = 1024;  // of a block's, by the system

// Bytes of all ones are NaN in every floating point type.
constexpr int kPoison = 0xFF;
constexpr unsigned char kRedZone = 0xA5;
constexpr size_t kRedZoneBytes = 256;
// Shared memory begins at a multiple of this and of nothing higher: kernels are promised no more.
constexpr size_t kSharedAlignment = 128;

Device simulated_device;
Report report;
uint64_t random_state = 0;

StackPool stacks;
Fiber main_fiber;

// The launch that runs.
struct Running {
  std::string kernel;
  void (*body)(const void*) = nullptr;
  const void* arguments = nullptr;
  std::vector<Thread*> ready;
  std::vector<std::unique_ptr<Cluster>> live;
  std::exception_ptr error;
  bool waits_for_previous = false;
  LaunchReport report;
};
Running* running = nullptr;

// The name without return type and parameters.
std::string kernel_name(const void* kernel) {
  Dl_info info = {};
  if (dladdr(kernel, &info) == 0) return "kernel";
  if (info.dli_sname == nullptr || info.dli_saddr != kernel) {
    char offset[32];
    std::snprintf(offset, sizeof(offset), "kernel at +0x%tx",
                  static_cast<const char*>(kernel) - static_cast<const char*>(info.dli_fbase));
    return offset;
  }
  int status = 0;
  char* demangled = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  std::string name = status == 0 ? demangled : info.dli_sname;
  std::free(demangled);
  if (!name.empty() && name.back() == ')') {
    int depth = 0;
    size_t i = name.size();
    do {
      --i;
      depth += name[i] == ')' ? 1 : name[i] == '(' ? -1 : 0;
    } while (i > 0 && depth > 0);
    name.resize(i);
  }
  const std::string returned = "void ";
  return name.compare(0, returned.size(), returned) == 0 ? name.substr(returned.size()) : name;
}

std::string at_block(const Block& block) {
  return running->kernel + ": block " + std::to_string(block.index);
}

// --- Blocks ------------------------------------------------------------------------------------

void make_shared(Block& block) {
  const auto bytes = static_cast<size_t>(shape.shared_bytes);
  block.storage.assign(bytes + 2 * kRedZoneBytes + 2 * kSharedAlignment, kRedZone);
  unsigned char* begin = block.storage.data() + kRedZoneBytes;
  while (reinterpret_cast<uintptr_t>(begin) % (2 * kSharedAlignment) != kSharedAlignment) ++begin;
  block.shared = begin;
  std::memset(begin, kPoison, bytes);
#ifdef __SANITIZE_ADDRESS__
  ASAN_POISON_MEMORY_REGION(begin - kRedZoneBytes, kRedZoneBytes);
  ASAN_POISON_MEMORY_REGION(begin + bytes, kRedZoneBytes);
#endif
}

void check_red_zones([[maybe_unused]] const Block& block) {
#ifndef __SANITIZE_ADDRESS__
  const auto is_intact = [](const unsigned char* begin) {
    return std::all_of(begin, begin + kRedZoneBytes,
                       [](unsigned char value) { return value == kRedZone; });
  };
  if (!is_intact(block.shared - kRedZoneBytes)) {
    throw Error(at_block(block) + " wrote before its shared memory");
  }
  if (!is_intact(block.shared + shape.shared_bytes)) {
    throw Error(at_block(block) + " wrote past the " + std::to_string(shape.shared_bytes) +
                " bytes of its shared memory");
  }
#endif
}

void start_cluster(int64_t index) {
  running->live.push_back(std::make_unique<Cluster>());
  Cluster& cluster = *running->live.back();
  cluster.live_blocks = shape.cluster_blocks;
  cluster.barrier.expected = shape.cluster_blocks * shape.threads;
  cluster.blocks.resize(static_cast<size_t>(shape.cluster_blocks));
  for (int rank = 0; rank < shape.cluster_blocks; ++rank) {
    Block& block = cluster.blocks[static_cast<size_t>(rank)];
    block.cluster = &cluster;
    block.index = index * shape.cluster_blocks + rank;
    block.rank = rank;
    make_shared(block);
    block.barrier.expected = shape.threads;
    block.warps.resize(static_cast<size_t>((shape.threads + kWarpThreads - 1) / kWarpThreads));
    for (size_t warp = 0; warp < block.warps.size(); ++warp) {
      block.warps[warp].barrier.expected =
          std::min(kWarpThreads, shape.threads - static_cast<int>(warp) * kWarpThreads);
    }
    block.threads.resize(static_cast<size_t>(shape.threads));
    for (int i = 0; i < shape.threads; ++i) {
      Thread& thread = block.threads[static_cast<size_t>(i)];
      thread.block = &block;
      thread.index = i;
      thread.may_touch_written = !shape.overlaps_previous;
      running->ready.push_back(&thread);
    }
  }
}

void end_block(Block& block) {
  check_red_zones(block);
  const bool may_land = std::any_of(block.copy_barriers.begin(), block.copy_barriers.end(),
                                    [](const auto& entry) {
                                      const CopyBarrierState& state = entry.second;
                                      return !state.copies.empty() || !state.peer_stores.empty();
                                    }) ||
                        std::any_of(block.threads.begin(), block.threads.end(),
                                    [](const Thread& thread) { return !thread.copies.empty(); });
  if (may_land) {
    throw Error(at_block(block) + " returned while copies to its shared memory may land");
  }
  running->report.barriers = std::max(running->report.barriers, block.barrier.passes);
  // What the rest of the cluster still reads of it is gone.
  std::memset(block.shared, kPoison, static_cast<size_t>(shape.shared_bytes));
  --block.cluster->live_blocks;
}

void end_cluster(Cluster& cluster) {
  running->report.cluster_barriers =
      std::max(running->report.cluster_barriers, cluster.barrier.passes);
  const auto is_it = [&](const std::unique_ptr<Cluster>& live) { return live.get() == &cluster; };
  running->live.erase(std::find_if(running->live.begin(), running->live.end(), is_it));
}

// --- Threads -----------------------------------------------------------------------------------

void run_thread() {
  fiber_entered(current->fiber);
  try {
    running->body(running->arguments);
    check_bulk_stores_read();
  } catch (...) {
    running->error = std::current_exception();
  }
  current->waits_in = nullptr;
  switch_fiber_for_good(current->fiber, main_fiber);
}

void leave_barrier(Barrier& barrier, const Thread& thread) {
  ++barrier.returned;
  if (barrier.waiting.empty()) return;
  const Thread& waiting = *barrier.waiting.front();
  throw Error(at_block(*thread.block) + ", thread " + std::to_string(thread.index) +
              " returned, but " + std::to_string(barrier.waiting.size()) + " of " +
              std::to_string(barrier.expected) + " threads wait in " + waiting.waits_in + " at " +
              waiting.waits_at.file + ":" + std::to_string(waiting.waits_at.line));
}

void end_thread(Thread& thread) {
  stacks.give(thread.fiber.stack);
  Block& block = *thread.block;
  leave_barrier(block.warps[static_cast<size_t>(thread.index / kWarpThreads)].barrier, thread);
  leave_barrier(block.barrier, thread);
  leave_barrier(block.cluster->barrier, thread);
  if (++block.returned == shape.threads) end_block(block);
}

// Runs a thread until it waits. Returns false if it has returned.
bool step(Thread& thread) {
  current = &thread;
  if (thread.fiber.context == nullptr) {
    if (!thread.block->started) {
      // What the rest of the cluster wrote before this block had begun is lost.
      thread.block->started = true;
      std::memset(thread.block->shared, kPoison, static_cast<size_t>(shape.shared_bytes));
    }
    start_fiber(thread.fiber, stacks.take(), run_thread);
  }
  thread.waits_in = nullptr;
  thread.waits_for = nullptr;
  switch_fiber(main_fiber, thread.fiber);
  current = nullptr;
  if (running->error) {
    stacks.give(thread.fiber.stack);
    std::rethrow_exception(running->error);
  }
  return thread.waits_in != nullptr;
}

[[noreturn]] void fail_deadlock() {
  constexpr size_t kMostPlaces = 8;
  std::map<std::tuple<int64_t, std::string, std::string, int, std::string>, int> places;
  for (const auto& cluster : running->live) {
    for (const Block& block : cluster->blocks) {
      if (block.returned == shape.threads) continue;
      for (const Thread& thread : block.threads) {
        if (thread.waits_in == nullptr) continue;
        ++places[{block.index, thread.waits_in, thread.waits_at.file, thread.waits_at.line,
                  thread.waits_for == nullptr ? "" : describe_barrier(block, thread.waits_for)}];
      }
    }
  }
  std::string what = running->kernel + ": deadlock:";
  size_t told = 0;
  for (const auto& [place, count] : places) {
    if (told == kMostPlaces) break;
    const auto& [block, function, file, line, barrier] = place;
    what += std::string(told++ == 0 ? " " : "; ") + "in block " + std::to_string(block) + ", " +
            std::to_string(count) + " of " + std::to_string(shape.threads) + " threads wait in " +
            function + " at " + file + ":" + std::to_string(line) + barrier;
  }
  if (places.size() > told) what += "; and " + std::to_string(places.size() - told) + " more";
  throw Error(what);
}

// The order in which the clusters of the grid start.
std::vector<int64_t> draw_order() {
  std::vector<int64_t> order(static_cast<size_t>(shape.blocks / shape.cluster_blocks));
  std::iota(order.begin(), order.end(), 0);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[draw(i)]);
  return order;
}

void run_grid() {
  const std::vector<int64_t> order = draw_order();
  const size_t at_once = shape.cooperative
                             ? order.size()
                             : static_cast<size_t>(std::max(1, simulated_device.blocks_at_once));
  size_t started = 0;
  std::vector<Thread*>& ready = running->ready;
  while (started < order.size() || !running->live.empty()) {
    while (started < order.size() && running->live.size() < at_once)
      start_cluster(order[started++]);
    if (ready.empty()) fail_deadlock();
    std::swap(ready[draw(ready.size())], ready.back());
    Thread& thread = *ready.back();
    ready.pop_back();
    if (step(thread)) continue;
    Cluster& cluster = *thread.block->cluster;
    end_thread(thread);
    if (cluster.live_blocks == 0) end_cluster(cluster);
  }
  if (shape.overlaps_previous && !running->waits_for_previous) {
    throw Error(running->kernel +
                " was launched to overlap the previous kernel and never waited for it");
  }
}

// The stacks of threads that wait for ever in a failed launch.
void take_stacks_back() {
  for (const auto& cluster : running->live) {
    for (const Block& block : cluster->blocks) {
      for (const Thread& thread : block.threads) {
        if (thread.waits_in != nullptr) stacks.give(thread.fiber.stack);
      }
    }
  }
}

// --- What cannot be launched ---------------------------------------------------------------------

const char* check_shape(const LaunchShape& shape) {
  const Device& device = simulated_device;
  if (shape.threads < 1 || shape.threads > kMostThreads) {
    return "a block has 1 to 1024 threads";
  }
  if (shape.blocks < 1 || shape.blocks > kMostBlocks) {
    return "a grid has 1 to 2147483647 blocks";
  }
  if (shape.shared_bytes < 0 || shape.shared_bytes > device.shared_per_block) {
    return "a block cannot have so much shared memory";
  }
  if (active_clusters(shape.cluster_blocks, shape.threads, shape.shared_bytes) == 0) {
    return "a cluster cannot have so many blocks";
  }
  if (shape.blocks % shape.cluster_blocks != 0) {
    return "the blocks of the grid do not make whole clusters";
  }
  if (shape.cooperative) {
    const int64_t resident = active_blocks(shape.threads, shape.shared_bytes);
    if (shape.blocks > resident * device.multiprocessors) {
      return "a cooperative grid has more blocks than fit on the device";
    }
  }
  return nullptr;
}

}  // namespace

const char* run(const LaunchShape& launched, const void* kernel, void (*body)(const void*),
                const void* arguments) {
  if (const char* error = check_shape(launched)) return error;
  shape = launched;
  memory.start_launch();
  Running launch;
  launch.kernel = kernel_name(kernel);
  launch.body = body;
  launch.arguments = arguments;
  running = &launch;
  try {
    run_grid();
  } catch (...) {
    take_stacks_back();
    forget_sleepers();
    running = nullptr;
    throw;
  }
  launch.report.kernel = launch.kernel;
  launch.report.blocks = shape.blocks;
  launch.report.threads = shape.threads;
  launch.report.shared_bytes = shape.shared_bytes;
  launch.report.cluster_blocks = shape.cluster_blocks;
  launch.report.cooperative = shape.cooperative;
  launch.report.overlaps_previous = shape.overlaps_previous;
  launch.report.traffic = memory.traffic();
  report.launches.push_back(std::move(launch.report));
  running = nullptr;
  return nullptr;
}

void fail(const std::string& what) {
  throw Error(at_block(*current->block) + ", thread " + std::to_string(current->index) + ": " +
              what);
}

uint64_t draw(uint64_t count) {
  // splitmix64
  uint64_t value = random_state += 0x9E3779B97F4A7C15;
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9;
  value = (value ^ (value >> 27)) * 0x94D049BB133111EB;
  return ((value ^ (value >> 31)) >> 32) * count >> 32;
}

void suspend(const char* function, Site site) {
  current->waits_in = function;
  current->waits_at = site;
  switch_fiber(current->fiber, main_fiber);
}

void resume(Thread& thread) { running->ready.push_back(&thread); }

void resume_all(std::vector<Thread*>& threads) {
  running->ready.insert(running->ready.end(), threads.begin(), threads.end());
  threads.clear();
}

void allow_next_kernel() { running->report.allows_next = true; }

void wait_for_previous_kernel() {
  running->waits_for_previous = true;
  current->may_touch_written = true;
}

// --- The user's side -----------------------------------------------------------------------------

Device& device() { return simulated_device; }

int active_blocks(int threads, int shared_bytes) {
  const Device& device = simulated_device;
  const int warps = (threads + kWarpThreads - 1) / kWarpThreads;
  return std::min({
      device.blocks_per_multiprocessor,
      device.threads_per_multiprocessor / (warps * kWarpThreads),
      device.shared_per_multiprocessor / (shared_bytes + kReservedShared),
  });
}

int active_clusters(int cluster_blocks, int threads, int shared_bytes) {
  for (size_t size = 0; size < simulated_device.clusters.size(); ++size) {
    if (cluster_blocks == 1 << size) {
      return simulated_device.clusters[size] * active_blocks(threads, shared_bytes);
    }
  }
  return 0;
}

void seed(uint64_t value) { random_state = value; }

int64_t Traffic::read_bytes() const {
  int64_t bytes = bulk_bytes;
  for (size_t i = 0; i < loads.size(); ++i) bytes += loads[i] << i;
  return bytes;
}

int64_t Traffic::written_bytes() const {
  int64_t bytes = bulk_stored_bytes;
  for (size_t i = 0; i < stores.size(); ++i) bytes += stores[i] << i;
  return bytes;
}

Traffic& Traffic::operator+=(const Traffic& other) {
  for (size_t i = 0; i < loads.size(); ++i) loads[i] += other.loads[i];
  for (size_t i = 0; i < stores.size(); ++i) stores[i] += other.stores[i];
  bulk_copies += other.bulk_copies;
  box_copies += other.box_copies;
  bulk_bytes += other.bulk_bytes;
  bulk_stores += other.bulk_stores;
  box_stores += other.box_stores;
  bulk_stored_bytes += other.bulk_stored_bytes;
  atomics += other.atomics;
  return *this;
}

Traffic LaunchReport::total() const {
  Traffic sum;
  for (const Traffic& part : traffic) sum += part;
  return sum;
}

Traffic Report::of(Kind kind) const {
  Traffic sum;
  for (const LaunchReport& launch : launches) sum += launch.of(kind);
  return sum;
}

Traffic Report::total() const {
  Traffic sum;
  for (const LaunchReport& launch : launches) sum += launch.total();
  return sum;
}

Report take_report() { return std::exchange(report, {}); }

}  // namespace fastbn::cudasim
