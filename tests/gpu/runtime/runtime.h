// SPDX-License-Identifier: BSD-3-Clause
//
// A CUDA runtime that does nothing, and fails as it is told.
#pragma once

#include <cuda_runtime_api.h>

namespace fastbn::runtime {

struct State {
  int current_device = 0;
  cudaError_t attributes_error = cudaSuccess;  // asking for those of a kernel
  cudaError_t clusters_error = cudaSuccess;    // counting clusters
  cudaError_t last_error = cudaSuccess;
  int questions = 0;  // for attributes of kernels
  int launches = 0;
};
extern State state;

}  // namespace fastbn::runtime
