// SPDX-License-Identifier: BSD-3-Clause
//
// How long a plan takes.
#pragma once

#include "types.h"

namespace fastbn::cuda {

// In seconds of the device's time. A model to tell plans apart, not a promise.
double predict_seconds(const Request& request, const Device& device, const Plan& plan);

// Blocks that are resident on the device at once, of kernels that stream what a mapping shares out.
int64_t resident_blocks(const Device& device, Mapping mapping);

}  // namespace fastbn::cuda
