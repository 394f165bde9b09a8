// SPDX-License-Identifier: BSD-3-Clause
//
// Asynchronous copies from global to shared memory. They land as late as they may, when they are
// waited for, in any order; until then their destination is poisoned.
#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "copy_barriers.h"
#include "memory.h"

namespace fastbn::cudasim {
namespace {

constexpr Access kCopyAsync = {"copy_async", /*stores=*/false, /*sees_stores=*/false};
constexpr Access kBulkCopy = {"bulk_copy", /*stores=*/false, /*sees_stores=*/false};
constexpr SharedAccess kCopyAsyncLands = {"copy_async()", /*writes=*/true,
                                          /*in_async_proxy=*/false};
constexpr SharedAccess kBulkCopyLands = {"bulk_copy()", /*writes=*/true, /*in_async_proxy=*/true};

constexpr int64_t kVectorBytes = 16;

// Of copies whose thread has not said which barrier waits for them.
constexpr Epoch kEver = ~Epoch{0};
}  // namespace

void check_range(const char* what, const void* shared, int64_t bytes, int64_t alignment) {
  if (!in_shared(*current->block, shared, bytes)) {
    fail(std::string(what) + " outside the block's shared memory");
  }
  if (reinterpret_cast<uintptr_t>(shared) % static_cast<uintptr_t>(alignment) != 0) {
    fail(std::string(what) + " shared memory that is not at a multiple of " +
         std::to_string(alignment));
  }
}

void check_bulk_range(const char* what, const void* shared, int64_t bytes) {
  check_range(what, shared, bytes, kBulkAlignment);
  if (bytes <= 0 || bytes % kBulkAlignment != 0) {
    fail(std::string(what) + " shared memory of " + std::to_string(bytes) +
         " bytes, not a multiple of 16");
  }
}

void check_poison(const void* shared, int64_t bytes) {
  const auto* begin = static_cast<const unsigned char*>(shared);
  if (std::any_of(begin, begin + bytes, [](unsigned char value) { return value != kPoison; })) {
    fail("the destination of an asynchronous copy was written before the copy had landed");
  }
}

void land(std::vector<Copy>& copies) {
  while (!copies.empty()) {
    std::swap(copies[draw(copies.size())], copies.back());
    const Copy copy = copies.back();
    check_poison(copy.shared, copy.bytes);
    copies.pop_back();
    if (copy.global == nullptr) {
      std::memset(copy.shared, 0, static_cast<size_t>(copy.bytes));
    } else {
      std::memcpy(copy.shared, copy.global, static_cast<size_t>(copy.bytes));
    }
  }
}

void copy_async(void* shared, const void* global) {
  check_range("copy_async() to", shared, kVectorBytes, kVectorBytes);
  ++memory.touch(global, kVectorBytes, kVectorBytes, kCopyAsync).loads[4];
  Block& block = *current->block;
  block.accesses.touch(block, shared, kVectorBytes, kCopyAsyncLands, shape.threads, kEver);
  std::memset(shared, kPoison, kVectorBytes);
  current->copies.push_back({shared, global, kVectorBytes});
}

void arrive_when_copied(void* barrier) {
  CopyBarrierState& state = find_barrier(barrier, "arrive_when_copied()");
  count_arrival(state, "arrive_when_copied()");
  ++state.missing_arrivals;
  ++state.landing_arrivals;
  for (const Copy& copy : current->copies) {
    current->block->accesses.hand_over(*current->block, copy.shared, copy.bytes, state.agent,
                                       next_epoch(state));
  }
  state.copies.insert(state.copies.end(), current->copies.begin(), current->copies.end());
  current->copies.clear();
  resume_all(state.waiting);
}

void bulk_copy(void* shared, const void* global, int64_t bytes, void* barrier) {
  check_bulk_range("bulk_copy() to", shared, bytes);
  CopyBarrierState& state = find_barrier(barrier, "bulk_copy()");
  Traffic& traffic = memory.touch(global, bytes, kBulkAlignment, kBulkCopy);
  ++traffic.bulk_copies;
  traffic.bulk_bytes += bytes;
  current->block->accesses.touch(*current->block, shared, bytes, kBulkCopyLands, state.agent,
                                 next_epoch(state));
  std::memset(shared, kPoison, static_cast<size_t>(bytes));
  state.copies.push_back({shared, global, bytes, /*in_bulk=*/true});
  resume_all(state.waiting);
}

}  // namespace fastbn::cudasim
