// SPDX-License-Identifier: BSD-3-Clause
//
// Asynchronous copies from global to shared memory. They land as late as they may, when they are
// waited for, in any order; until then their destination is poisoned.
#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "machine.h"
#include "memory.h"

namespace fastbn::cudasim {
namespace {

constexpr Access kCopyAsync = {"copy_async", /*stores=*/false, /*sees_stores=*/false};
constexpr Access kBulkCopy = {"bulk_copy", /*stores=*/false, /*sees_stores=*/false};

constexpr unsigned char kPoison = 0xFF;
constexpr int64_t kVectorBytes = 16;
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

void count_arrival(CopyBarrierState& state, const char* function) {
  if (state.missing_arrivals == state.landing_arrivals) {
    fail(std::string(function) + " once more than the barrier has arrivals");
  }
  --state.missing_arrivals;
}

void end_phase_if_complete(CopyBarrierState& state) {
  if (state.missing_arrivals > 0 || state.missing_bytes != 0) return;
  ++state.phase;
  state.missing_arrivals = state.arrivals;
}

}  // namespace

void copy_async(void* shared, const void* global) {
  check_destination(shared, kVectorBytes, kVectorBytes, "copy_async()");
  ++memory.touch(global, kVectorBytes, kVectorBytes, kCopyAsync).loads[4];
  std::memset(shared, kPoison, kVectorBytes);
  current->copies.push_back({shared, global, kVectorBytes});
}

void arrive_when_copied(void* barrier) {
  CopyBarrierState& state = find_barrier(barrier, "arrive_when_copied()");
  count_arrival(state, "arrive_when_copied()");
  ++state.missing_arrivals;
  ++state.landing_arrivals;
  state.copies.insert(state.copies.end(), current->copies.begin(), current->copies.end());
  current->copies.clear();
  resume_all(state.waiting);
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
  count_arrival(state, "expect_bytes()");
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
  state.copies.push_back({shared, global, bytes, /*in_bulk=*/true});
  resume_all(state.waiting);
}

void wait_barrier(void* barrier, int parity, Site site) {
  for (;;) {
    CopyBarrierState& state = find_barrier(barrier, "wait_barrier()");
    if (static_cast<int>(state.phase % 2) != parity) return;
    for (const Copy& copy : state.copies) {
      if (copy.in_bulk) state.missing_bytes -= copy.bytes;
    }
    land(state.copies);
    state.missing_arrivals -= std::exchange(state.landing_arrivals, 0);
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
