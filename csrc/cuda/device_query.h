// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <string>

#include "planner/types.h"

namespace fastbn::cuda {

// What is asked of the CUDA backend besides computing; a build without it throws.

// The properties of a GPU of this machine.
const Device& device_properties(int index);

// Uses an algorithm from now on, whatever it costs; FASTBN_CUDA_ALGORITHM does so from the start.
// For benchmarks.
void force_algorithm(const std::string& name);

}  // namespace fastbn::cuda
