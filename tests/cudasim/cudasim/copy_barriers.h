// SPDX-License-Identifier: BSD-3-Clause
//
// What copies, bulk stores and barriers have in common. Part of the simulator behind
// gpu.h; not for its users.
#pragma once

#include <cstdint>
#include <vector>

#include "machine.h"

namespace fastbn::cudasim {

// Finds a barrier of a block, or of the current one.
CopyBarrierState& find_barrier(Block& block, const void* barrier, const char* function);
CopyBarrierState& find_barrier(const void* barrier, const char* function);

// The one in which copies of the present phase write.
inline Epoch next_epoch(const CopyBarrierState& state) {
  return static_cast<Epoch>(state.phase + 1);
}

void count_arrival(CopyBarrierState& state, const char* function);

constexpr int64_t kBulkAlignment = 16;

// Fails where a range is not in the block's shared memory, or not where the machine wants it.
void check_range(const char* what, const void* shared, int64_t bytes, int64_t alignment);
void check_bulk_range(const char* what, const void* shared, int64_t bytes);

// A bulk store of the current thread reads a range of shared memory,
void start_bulk_store(const void* shared, int64_t bytes, const SharedAccess& access);
// and a piece of that, written by threads, goes to global memory.
void store_piece(void* global, const void* shared, int64_t bytes, const char* function);

// Where something is going to land, until it does.
constexpr unsigned char kPoison = 0xFF;
void check_poison(const void* shared, int64_t bytes);

// Fails where blocks of the cluster have stored more bytes than the present phase expects.
void check_expected(const Block& block, const void* barrier, const CopyBarrierState& state,
                    const char* function);

// Lets the store of a peer land.
void land_one(CopyBarrierState& state);

// Lets copies land in any order, and empties the list.
void land(std::vector<Copy>& copies);

}  // namespace fastbn::cudasim
