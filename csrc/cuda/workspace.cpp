// SPDX-License-Identifier: BSD-3-Clause
#include "workspace.h"

#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>

#include <algorithm>
#include <mutex>
#include <unordered_map>
#include <utility>

#include "planner/types.h"

namespace fastbn::cuda {

namespace {

// Enough for most problems on most devices, so that few workspaces ever grow.
constexpr int64_t kMinBytes = 2 << 20;

struct Memory {
  void* data = nullptr;
  int64_t bytes = 0;
  unsigned long long capture = 0;  // that it was allocated for; 0 for none
};

// Replaces memory by more of it, zeroed where counters and barriers are, in the order of the
// stream. What the allocator gets back it hands out again in that order too, and memory allocated
// under capture belongs to the graph, whose replays begin with the zeros.
void allocate(c10::cuda::CUDAStream stream, int64_t bytes, unsigned long long capture,
              Memory& memory) {
  namespace allocator = c10::cuda::CUDACachingAllocator;
  if (memory.data != nullptr) allocator::raw_delete(memory.data);
  memory = {};  // what is left if the following throws
  bytes = std::max(bytes, kMinBytes);
  void* data = allocator::raw_alloc_with_stream(static_cast<size_t>(bytes), stream);
  const cudaError_t error = cudaMemsetAsync(data, 0, kZeroedBytes, stream);
  if (error != cudaSuccess) allocator::raw_delete(data);
  C10_CUDA_CHECK(error);
  memory = {data, bytes, capture};
}

// The graph that the stream's work goes to; 0 if it is executed.
unsigned long long capture_id(c10::cuda::CUDAStream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  C10_CUDA_CHECK(cudaStreamGetCaptureInfo(stream, &status, &id));
  return status == cudaStreamCaptureStatusActive ? id : 0;
}

}  // namespace

WorkspaceLease lease_workspace(c10::cuda::CUDAStream stream, int64_t bytes) {
  struct StreamMemory {
    std::mutex in_use;
    Memory executed;
    Memory captured;  // apart, as replays may run beside the stream's other work
  };
  if (bytes == 0) return {};
  static std::mutex mutex;
  // Never destroyed: at exit the driver may be gone before.
  static auto& workspaces = *new std::unordered_map<c10::cuda::CUDAStream, StreamMemory>();

  const unsigned long long capture = capture_id(stream);
  std::unique_lock<std::mutex> look_up(mutex);
  StreamMemory& of_stream = workspaces[stream];
  look_up.unlock();
  std::unique_lock<std::mutex> lock(of_stream.in_use);
  Memory& memory = capture == 0 ? of_stream.executed : of_stream.captured;
  if (memory.bytes < bytes || memory.capture != capture) {
    allocate(stream, bytes, capture, memory);
  }
  return {std::move(lock), memory.data};
}

}  // namespace fastbn::cuda
