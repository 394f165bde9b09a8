// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <string>

#include "planner/types.h"

namespace fastbn::cuda {

// What is asked of the CUDA backend besides computing.

// The properties of a GPU of this machine. A build without CUDA throws.
const Device& device_properties(int index);

// Uses an algorithm from now on, whatever it costs; FASTBN_CUDA_ALGORITHM does so from the start.
// For benchmarks; a build without CUDA throws.
void force_algorithm(const std::string& name);

// Plans persistent grids so that they leave so many multiprocessors to other kernels from now on.
void leave_free(int multiprocessors);

}  // namespace fastbn::cuda
