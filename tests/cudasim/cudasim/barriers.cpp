// SPDX-License-Identifier: BSD-3-Clause
//
// Waiting for other threads: barriers, exchanges within a warp, counters in global memory.
#include <algorithm>
#include <cstring>

#include "machine.h"
#include "memory.h"

namespace fastbn::cudasim {
namespace {

constexpr Access kAtomicIncWrap = {"atomic_inc_wrap", /*stores=*/true, /*sees_stores=*/true,
                                   /*is_atomic=*/true};
constexpr Access kAddAcqRel = {"add_acq_rel", /*stores=*/true, /*sees_stores=*/true,
                               /*is_atomic=*/true};
constexpr Access kLoadRelaxed = {"load_relaxed", /*stores=*/false, /*sees_stores=*/true,
                                 /*is_atomic=*/true};
constexpr Access kLoadAcquire = {"load_acquire", /*stores=*/false, /*sees_stores=*/true,
                                 /*is_atomic=*/true};

// Threads that poll global memory sleep until the next atomic of anyone: the epoch.
constexpr int64_t kPollsBeforeSleep = 4;
uint64_t epoch = 0;
std::vector<Thread*> sleepers;

std::string name(const char* function, Site site) {
  return std::string(function) + " at " + site.file + ":" + std::to_string(site.line);
}

bool same(Site one, Site other) {
  return one.line == other.line && std::strcmp(one.file, other.file) == 0;
}

// Whether what the threads did before is ordered before what they do after.
enum class Order { kNone, kAll };

void wait(Barrier& barrier, Order order, const char* function, Site site) {
  if (barrier.returned > 0) {
    fail("waits in " + name(function, site) + " for " + std::to_string(barrier.expected) +
         " threads of which " + std::to_string(barrier.returned) + " have returned");
  }
  if (!barrier.waiting.empty() && !same(barrier.site, site)) {
    const Thread& other = *barrier.waiting.front();
    fail("waits in " + name(function, site) + " while thread " + std::to_string(other.index) +
         " of block " + std::to_string(other.block->index) + " waits in " +
         name(other.waits_in, other.waits_at));
  }
  barrier.site = site;
  barrier.waiting.push_back(current);
  if (static_cast<int>(barrier.waiting.size()) == barrier.expected) {
    ++barrier.passes;
    gather_stores(barrier);
    if (order == Order::kAll) share_knowledge(barrier.waiting);
    resume_all(barrier.waiting);
  }
  suspend(function, site);
}

Warp& own_warp() {
  return current->block->warps[static_cast<size_t>(current->index / kWarpThreads)];
}

void start_epoch() {
  ++epoch;
  resume_all(sleepers);
}

// Reads a counter. A thread that reads again and again what has not changed waits for someone to
// change it.
unsigned poll(const unsigned* address, const Access& access, const char* function, Site site) {
  memory.touch(address, sizeof(unsigned), sizeof(unsigned), access);
  if (current->polled_epoch != epoch) {
    current->polled_epoch = epoch;
    current->polls = 0;
  }
  if (++current->polls > kPollsBeforeSleep) {
    sleepers.push_back(current);
  } else {
    resume(*current);
  }
  suspend(function, site);
  return *address;
}

}  // namespace

void forget_sleepers() { sleepers.clear(); }

void sync_block(Site site) { wait(current->block->barrier, Order::kAll, "sync_block()", site); }

void sync_warp(Site site) { wait(own_warp().barrier, Order::kAll, "sync_warp()", site); }

void sync_cluster(Site site) {
  wait(current->block->cluster->barrier, Order::kAll, "sync_cluster()", site);
}

void exchange(const void* value, int bytes, int source_lane, void* result, const char* function,
              Site site) {
  Warp& warp = own_warp();
  if (warp.barrier.expected != kWarpThreads) {
    fail(name(function, site) + " in a warp of " + std::to_string(warp.barrier.expected) +
         " threads");
  }
  auto& slots = warp.slots[warp.barrier.passes % 2];
  std::memcpy(slots[current->index % kWarpThreads], value, static_cast<size_t>(bytes));
  wait(warp.barrier, Order::kNone, function, site);
  std::memcpy(result, slots[source_lane], static_cast<size_t>(bytes));
}

bool in_shared(const Block& block, const void* address, int64_t bytes) {
  const auto* begin = static_cast<const unsigned char*>(address);
  const auto offset =
      reinterpret_cast<uintptr_t>(begin) - reinterpret_cast<uintptr_t>(block.shared);
  return offset <= static_cast<uintptr_t>(shape.shared_bytes) &&
         static_cast<uintptr_t>(bytes) <= static_cast<uintptr_t>(shape.shared_bytes) - offset;
}

void* peer_shared(void* own, int rank) {
  const Block& block = *current->block;
  if (rank < 0 || rank >= shape.cluster_blocks) {
    fail("peer_shared() of block " + std::to_string(rank) + " in a cluster of " +
         std::to_string(shape.cluster_blocks));
  }
  if (!in_shared(block, own, 0)) {
    fail("peer_shared() of an address outside the block's shared memory");
  }
  const Block& peer = block.cluster->blocks[static_cast<size_t>(rank)];
  if (peer.returned > 0) {
    fail("peer_shared() of block " + std::to_string(rank) +
         " of the cluster, of which threads have returned");
  }
  return peer.shared + (static_cast<unsigned char*>(own) - block.shared);
}

unsigned atomic_inc_wrap(unsigned* counter, unsigned last) {
  ++memory.touch(counter, sizeof(unsigned), sizeof(unsigned), kAtomicIncWrap).atomics;
  const unsigned before = *counter;
  *counter = before >= last ? 0 : before + 1;
  start_epoch();
  return before;
}

unsigned add_acq_rel(unsigned* counter, unsigned value) {
  ++memory.touch(counter, sizeof(unsigned), sizeof(unsigned), kAddAcqRel).atomics;
  fence_device();
  current->block->read_relaxed = false;
  const unsigned before = *counter;
  *counter = before + value;
  start_epoch();
  return before;
}

unsigned load_relaxed(const unsigned* address, Site site) {
  const unsigned value = poll(address, kLoadRelaxed, "load_relaxed()", site);
  current->block->read_relaxed = true;
  return value;
}

unsigned load_acquire(const unsigned* address, Site site) {
  const unsigned value = poll(address, kLoadAcquire, "load_acquire()", site);
  current->block->read_relaxed = false;
  return value;
}

}  // namespace fastbn::cudasim
