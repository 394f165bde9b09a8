// SPDX-License-Identifier: BSD-3-Clause
//
// The host's side of the machine: launching kernels, and asking the driver what fits.
#pragma once

#include "intrinsics.cuh"
#include "launch_shape.h"

#ifndef FASTBN_SIMULATOR

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

namespace fastbn::gpu {

using Stream = cudaStream_t;

namespace detail {

// Facts about a kernel on the current device.
struct KernelFacts {
  // Its machine code is for 9.0 or later, and so has what came with it: a GPU of 9.0 may run code
  // that was compiled for less.
  bool is_for_hopper = false;
};

// Also lets the kernel have all shared memory that a block can, and large clusters where there are
// any: once and for all, as it may be launched from several threads at once.
inline cudaError_t learn(const void* kernel, int device, KernelFacts& facts) {
  cudaFuncAttributes attributes;
  int shared_bytes = 0;
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 shared_bytes - static_cast<int>(attributes.sharedSizeBytes));
  }
  if (error != cudaSuccess) return error;
  facts.is_for_hopper = attributes.ptxVersion >= 90;
  if (facts.is_for_hopper &&
      cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) !=
          cudaSuccess) {
    cudaGetLastError();  // those of 8 are the largest here
  }
  return cudaSuccess;
}

// Remembers what it has found. Failures it forgets: the first question loads a kernel's code, for
// which there may be memory the next time.
inline cudaError_t find_facts(const void* kernel, KernelFacts& facts) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, KernelFacts> known;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find({device, kernel});
  if (found != known.end()) {
    facts = found->second;
    return cudaSuccess;
  }
  error = learn(kernel, device, facts);
  if (error == cudaSuccess) known.emplace(std::make_pair(device, kernel), facts);
  return error;
}

template <typename... Parameters>
cudaError_t find_facts(void (*kernel)(Parameters...), KernelFacts& facts) {
  return find_facts(reinterpret_cast<const void*>(kernel), facts);
}

// Whether the driver's answer is that a device has none of what it was asked for, now and always.
inline bool says_none(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidClusterSize:
    case cudaErrorInvalidConfiguration:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorInvalidValue:
    case cudaErrorLaunchOutOfResources:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorNotSupported:
      return true;
    default:
      return false;
  }
}

// A count by its answer. Throws where the driver could not say, so that nobody takes that for none.
inline int count_or_none(int count, cudaError_t error) {
  if (error == cudaSuccess) return count;
  cudaGetLastError();  // reported here, and not to whoever asks next
  if (says_none(error)) return 0;
  throw std::runtime_error(std::string("fastbn: asking what the GPU can run at once failed: ") +
                           cudaGetErrorString(error));
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
  detail::KernelFacts facts;
  const cudaError_t error = detail::find_facts(kernel, facts);
  return detail::count_or_none(facts.is_for_hopper, error) != 0;
}

// How many blocks of a shape fit a multiprocessor of the current device.
template <typename... Parameters>
int active_blocks(const LaunchShape& shape, void (*kernel)(Parameters...)) {
  int blocks = 0;
  detail::KernelFacts facts;
  cudaError_t error = detail::find_facts(kernel, facts);
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, shape.threads,
                                                          static_cast<size_t>(shape.shared_bytes));
  }
  return detail::count_or_none(blocks, error);
}

// How many clusters of a shape run at once on the current device; none where that is not to be had.
template <typename... Parameters>
int active_clusters(const LaunchShape& shape, void (*kernel)(Parameters...)) {
  const detail::Configuration configuration(nullptr, shape, /*overlaps_previous=*/false);
  int clusters = 0;
  detail::KernelFacts facts;
  cudaError_t error = detail::find_facts(kernel, facts);
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &configuration.config);
  }
  return detail::count_or_none(clusters, error);
}

// Null, or what is wrong.
template <typename... Parameters>
const char* launch(Stream stream, const LaunchShape& shape, void (*kernel)(Parameters...),
                   const Parameters&... arguments) {
  detail::KernelFacts facts;
  cudaError_t error = detail::find_facts(kernel, facts);
  const detail::Configuration configuration(stream, shape,
                                            shape.overlaps_previous && facts.is_for_hopper);
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&configuration.config, kernel, arguments...);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // reported here, and not to whoever asks next
  return cudaGetErrorString(error);
}

}  // namespace fastbn::gpu

#endif
