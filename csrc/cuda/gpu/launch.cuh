// SPDX-License-Identifier: BSD-3-Clause
//
// The host's side of the machine: launching kernels, and asking the driver what fits.
#pragma once

#include "intrinsics.cuh"
#include "launch_shape.h"

#ifndef FASTBN_SIMULATOR

#include <map>
#include <mutex>
#include <utility>

namespace fastbn::gpu {

using Stream = cudaStream_t;

namespace detail {

// Facts about a kernel on the current device.
struct KernelFacts {
  // Its machine code is for 9.0 or later, and so has what came with it: a GPU of 9.0 may run code
  // that was compiled for less.
  bool is_for_hopper = false;
  cudaError_t error = cudaSuccess;
};

// Also lets the kernel have all shared memory that a block can, and large clusters where there are
// any: once and for all, as it may be launched from several threads at once.
inline KernelFacts learn(const void* kernel, int device) {
  KernelFacts facts;
  cudaFuncAttributes attributes;
  int shared_bytes = 0;
  facts.error = cudaFuncGetAttributes(&attributes, kernel);
  if (facts.error == cudaSuccess) {
    facts.error =
        cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (facts.error == cudaSuccess) {
    facts.error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       shared_bytes - static_cast<int>(attributes.sharedSizeBytes));
  }
  if (facts.error != cudaSuccess) return facts;
  facts.is_for_hopper = attributes.ptxVersion >= 90;
  if (facts.is_for_hopper &&
      cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) !=
          cudaSuccess) {
    cudaGetLastError();  // those of 8 are the largest here
  }
  return facts;
}

inline KernelFacts facts(const void* kernel) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, KernelFacts> known;
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return {false, error};
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find({device, kernel});
  if (found != known.end()) return found->second;
  return known.emplace(std::make_pair(device, kernel), learn(kernel, device)).first->second;
}

template <typename... Parameters>
KernelFacts facts(void (*kernel)(Parameters...)) {
  return facts(reinterpret_cast<const void*>(kernel));
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

template <typename... Parameters>
bool is_code_for_hopper(void (*kernel)(Parameters...)) {
  return detail::facts(kernel).is_for_hopper;
}

// How many blocks of a shape fit a multiprocessor of the current device.
template <typename... Parameters>
int active_blocks(const LaunchShape& shape, void (*kernel)(Parameters...)) {
  int blocks = 0;
  cudaError_t error = detail::facts(kernel).error;
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
  cudaError_t error = detail::facts(kernel).error;
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
  const detail::KernelFacts facts = detail::facts(kernel);
  const detail::Configuration configuration(stream, shape,
                                            shape.overlaps_previous && facts.is_for_hopper);
  cudaError_t error = facts.error;
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&configuration.config, kernel, arguments...);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // reported here, and not to whoever asks next
  return cudaGetErrorString(error);
}

}  // namespace fastbn::gpu

#endif
