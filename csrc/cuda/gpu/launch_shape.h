// SPDX-License-Identifier: BSD-3-Clause
//
// How a kernel is launched, on a GPU as on a simulated one.
#pragma once

#include <cstdint>

namespace fastbn::gpu {

struct LaunchShape {
  int64_t blocks;
  int threads;
  int shared_bytes;
  bool overlaps_previous = false;  // calls wait_for_previous_kernel()
  int cluster_blocks = 1;
  bool cooperative = false;  // all blocks live at once
};

}  // namespace fastbn::gpu
