// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <c10/cuda/CUDAStream.h>

#include <cstdint>
#include <mutex>

namespace fastbn::cuda {

// Memory for the kernels of one call, which its holder alone may launch on that stream meanwhile.
struct WorkspaceLease {
  std::unique_lock<std::mutex> lock;
  void* data = nullptr;
};

// `bytes` on the stream's device, of which the first kZeroedBytes began as zeros; null for none.
// Calls on one stream, whose kernels run one after another, share one workspace, and so do those
// that one stream adds to one graph under capture; no others do.
WorkspaceLease lease_workspace(c10::cuda::CUDAStream stream, int64_t bytes);

}  // namespace fastbn::cuda
