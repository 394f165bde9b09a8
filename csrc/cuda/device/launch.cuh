// SPDX-License-Identifier: BSD-3-Clause
//
// The host's side of the machine: launching kernels, and asking the driver what fits.
#pragma once

#include "gpu.cuh"

#ifdef __CUDACC__

#include <mutex>
#include <unordered_map>

namespace fastbn::gpu {

using Stream = cudaStream_t;

struct LaunchShape {
  int64_t blocks;
  int threads;
  int shared_bytes;
  bool overlaps_previous = false;  // calls wait_for_previous_kernel()
  int cluster_blocks = 1;
  bool cooperative = false;  // all blocks live at once
};

namespace detail {

inline bool is_code_for_hopper(const void* kernel) {
  static std::mutex mutex;
  static std::unordered_map<const void*, bool> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(kernel);
  if (found != known.end()) return found->second;
  cudaFuncAttributes attributes;
  const bool is_code =
      cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
  return known.emplace(kernel, is_code).first->second;
}

// Lets a kernel have what it must ask for: much shared memory, large clusters.
inline cudaError_t allow(const LaunchShape& shape, const void* kernel) {
  constexpr int kGrantedSharedBytes = 48 << 10;
  constexpr int kPortableCluster = 8;
  cudaError_t error = cudaSuccess;
  if (shape.shared_bytes > kGrantedSharedBytes) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 shape.shared_bytes);
  }
  if (error == cudaSuccess && shape.cluster_blocks > kPortableCluster) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  return error;
}

// A launch as the runtime wants it described; refers to itself.
struct Configuration {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attributes[3];

  Configuration(Stream stream, const LaunchShape& shape, bool overlaps_previous) {
    config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
    config.blockDim = dim3(static_cast<unsigned>(shape.threads));
    config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
    config.stream = stream;
    config.attrs = attributes;
    if (overlaps_previous) {
      cudaLaunchAttribute& attribute = add(cudaLaunchAttributeProgrammaticStreamSerialization);
      attribute.val.programmaticStreamSerializationAllowed = 1;
    }
    if (shape.cluster_blocks > 1) {
      cudaLaunchAttribute& attribute = add(cudaLaunchAttributeClusterDimension);
      attribute.val.clusterDim.x = static_cast<unsigned>(shape.cluster_blocks);
      attribute.val.clusterDim.y = 1;
      attribute.val.clusterDim.z = 1;
    }
    if (shape.cooperative) add(cudaLaunchAttributeCooperative).val.cooperative = 1;
  }
  Configuration(const Configuration&) = delete;

 private:
  cudaLaunchAttribute& add(cudaLaunchAttributeID id) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute = {};
    attribute.id = id;
    return attribute;
  }
};

}  // namespace detail

// Whether a kernel's machine code is for 9.0 or later, and so has what came with it: a GPU of 9.0
// may run code that was compiled for less.
template <typename... Parameters>
bool is_code_for_hopper(void (*kernel)(Parameters...)) {
  return detail::is_code_for_hopper(reinterpret_cast<const void*>(kernel));
}

// How many blocks of a shape fit a multiprocessor of the current device.
template <typename... Parameters>
int active_blocks(const LaunchShape& shape, void (*kernel)(Parameters...)) {
  int blocks = 0;
  cudaError_t error = detail::allow(shape, reinterpret_cast<const void*>(kernel));
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, shape.threads,
                                                          static_cast<size_t>(shape.shared_bytes));
  }
  if (error == cudaSuccess) return blocks;
  cudaGetLastError();
  return 0;
}

// How many clusters of a shape run at once on the current device; none where that is not to be had.
template <typename... Parameters>
int active_clusters(const LaunchShape& shape, void (*kernel)(Parameters...)) {
  const detail::Configuration configuration(nullptr, shape, /*overlaps_previous=*/false);
  int clusters = 0;
  cudaError_t error = detail::allow(shape, reinterpret_cast<const void*>(kernel));
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &configuration.config);
  }
  if (error == cudaSuccess) return clusters;
  cudaGetLastError();  // this device has none
  return 0;
}

// Null, or what is wrong.
template <typename... Parameters>
const char* launch(Stream stream, const LaunchShape& shape, void (*kernel)(Parameters...),
                   const Parameters&... arguments) {
  const bool overlaps = shape.overlaps_previous && is_code_for_hopper(kernel);
  const detail::Configuration configuration(stream, shape, overlaps);
  cudaError_t error = detail::allow(shape, reinterpret_cast<const void*>(kernel));
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&configuration.config, kernel, arguments...);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // reported here, and not to whoever asks next
  return cudaGetErrorString(error);
}

}  // namespace fastbn::gpu

#endif
