// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <string>

#include "plan.h"

namespace fastbn::cuda {

// What builds without CUDA throw at. The properties of a GPU of this machine:
const Device& device_properties(int index);

// For benchmarks: what to use from now on whatever it costs, as FASTBN_CUDA_ALGORITHM says it from
// the start.
void force_algorithm(const std::string& name);

}  // namespace fastbn::cuda
