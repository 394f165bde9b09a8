// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <c10/cuda/CUDAStream.h>

#include <cstdint>

namespace fastbn::cuda {

// Memory for a launch on the current stream of the current device: `bytes` of it at least, of which
// kCounters counters are zero. Calls on one stream, which run one after another, share one
// workspace, and so do those that one stream adds to one graph under capture; no others do.
void* workspace(c10::cuda::CUDAStream stream, int64_t bytes);

}  // namespace fastbn::cuda
