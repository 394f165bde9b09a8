// SPDX-License-Identifier: BSD-3-Clause
//
// Asynchronous copies from global to shared memory. They land as late as they may, when they are
// waited for, in any order; until then their destination is poisoned.
#include <algorithm>
#include <cstring>
#include <string>

#include "machine.h"
#include "memory.h"

namespace fastbn::cudasim {
namespace {

constexpr Access kCopyAsync = {"copy_async", /*stores=*/false, /*sees_stores=*/false};
constexpr Access kBulkCopy = {"bulk_copy", /*stores=*/false, /*sees_stores=*/false};

constexpr unsigned char kPoison = 0xFF;
constexpr int64_t kBulkAlignment = 16;
constexpr int64_t kBarrierBytes = 8;
constexpr int64_t kMostExpectedBytes = (1 << 20) - 1;

// What a barrier holds of the hardware's state, to notice when something else is written over it.
constexpr uint64_t kBarrierMark = 0xC0B1B0A1E5C0B1B0;

void check_destination(const void* shared, int64_t bytes, int64_t alignment, const char* function) {
  if (!in_shared(*current->block, shared, bytes)) {
    fail(std::string(function) + " to outside the block's shared memory");
  }
  if (reinterpret_cast<uintptr_t>(shared) % static_cast<uintptr_t>(alignment) != 0) {
    fail(std::string(function) + " to shared memory that is not at a multiple of " +
         std::to_string(alignment));
  }
}

void land(std::vector<Copy>& copies) {
  while (!copies.empty()) {
    std::swap(copies[draw(copies.size())], copies.back());
    const Copy copy = copies.back();
    const auto* shared = static_cast<const unsigned char*>(copy.shared);
    if (std::any_of(shared, shared + copy.bytes,
                    [](unsigned char value) { return value != kPoison; })) {
      fail("the destination of an asynchronous copy was written before the copy had landed");
    }
    copies.pop_back();
    std::memcpy(copy.shared, copy.global, static_cast<size_t>(copy.bytes));
  }
}

CopyBarrierState& find_barrier(const void* barrier, const char* function) {
  const auto found = current->block->copy_barriers.find(barrier);
  if (found == current->block->copy_barriers.end()) {
    fail(std::string(function) + " of a barrier that init_barrier() was not called for");
  }
  uint64_t mark;
  std::memcpy(&mark, barrier, sizeof(mark));
  if (mark != kBarrierMark) fail(std::string(function) + " of a barrier that was written over");
  return found->second;
}

void end_phase_if_complete(CopyBarrierState& state) {
  if (state.missing_arrivals > 0 || state.missing_bytes != 0) return;
  ++state.phase;
  state.missing_arrivals = state.arrivals;
}

}  // namespace

void copy_async(void* shared, const void* global, int bytes) {
  check_destination(shared, bytes, bytes, "copy_async()");
  Traffic& traffic = memory.touch(global, bytes, bytes, kCopyAsync);
  ++traffic.loads[static_cast<size_t>(bytes == 4 ? 2 : bytes == 8 ? 3 : 4)];
  std::memset(shared, kPoison, static_cast<size_t>(bytes));
  current->open_copies.push_back({shared, global, bytes});
}

void commit_copies() {
  current->copy_groups.push_back(std::move(current->open_copies));
  current->open_copies.clear();
}

void wait_copies(int pending) {
  std::vector<std::vector<Copy>>& groups = current->copy_groups;
  if (groups.size() <= static_cast<size_t>(pending)) return;
  const auto last = groups.end() - pending;
  std::vector<Copy> landing;
  for (auto group = groups.begin(); group != last; ++group) {
    landing.insert(landing.end(), group->begin(), group->end());
  }
  groups.erase(groups.begin(), last);
  land(landing);
}

void init_barrier(void* barrier, int arrivals) {
  check_destination(barrier, kBarrierBytes, kBarrierBytes, "init_barrier()");
  if (arrivals < 1) fail("init_barrier() for no arrivals");
  std::memcpy(barrier, &kBarrierMark, sizeof(kBarrierMark));
  CopyBarrierState state;
  state.arrivals = arrivals;
  state.missing_arrivals = arrivals;
  current->block->copy_barriers[barrier] = std::move(state);
}

void expect_bytes(void* barrier, int64_t bytes) {
  CopyBarrierState& state = find_barrier(barrier, "expect_bytes()");
  if (bytes < 0 || bytes > kMostExpectedBytes) {
    fail("expect_bytes() of " + std::to_string(bytes) + " bytes, more than a barrier can count");
  }
  if (state.missing_arrivals == 0) fail("expect_bytes() once more than the barrier has arrivals");
  --state.missing_arrivals;
  state.missing_bytes += bytes;
  end_phase_if_complete(state);
  resume_all(state.waiting);
}

void bulk_copy(void* shared, const void* global, int64_t bytes, void* barrier) {
  check_destination(shared, bytes, kBulkAlignment, "bulk_copy()");
  if (bytes <= 0 || bytes % kBulkAlignment != 0) {
    fail("bulk_copy() of " + std::to_string(bytes) + " bytes, not a multiple of 16");
  }
  CopyBarrierState& state = find_barrier(barrier, "bulk_copy()");
  Traffic& traffic = memory.touch(global, bytes, kBulkAlignment, kBulkCopy);
  ++traffic.bulk_copies;
  traffic.bulk_bytes += bytes;
  std::memset(shared, kPoison, static_cast<size_t>(bytes));
  state.copies.push_back({shared, global, bytes});
  resume_all(state.waiting);
}

void wait_barrier(void* barrier, int parity, Site site) {
  for (;;) {
    CopyBarrierState& state = find_barrier(barrier, "wait_barrier()");
    if (static_cast<int>(state.phase % 2) != parity) return;
    for (const Copy& copy : state.copies) state.missing_bytes -= copy.bytes;
    land(state.copies);
    end_phase_if_complete(state);
    if (static_cast<int>(state.phase % 2) != parity) {
      resume_all(state.waiting);
      return;
    }
    state.waiting.push_back(current);
    suspend("wait_barrier()", site);
  }
}

}  // namespace fastbn::cudasim
