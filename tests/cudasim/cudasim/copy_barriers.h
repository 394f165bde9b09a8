// SPDX-License-Identifier: BSD-3-Clause
//
// What copies and the barriers that wait for them have in common. Part of the simulator behind
// gpu.h; not for its users.
#pragma once

#include <cstdint>
#include <vector>

#include "machine.h"

namespace fastbn::cudasim {

// Finds a barrier of the current block.
CopyBarrierState& find_barrier(const void* barrier, const char* function);

void count_arrival(CopyBarrierState& state, const char* function);

void check_destination(const void* shared, int64_t bytes, int64_t alignment, const char* function);

// Lets copies land in any order, and empties the list.
void land(std::vector<Copy>& copies);

}  // namespace fastbn::cudasim
