// SPDX-License-Identifier: BSD-3-Clause
//
// A model of how long a plan takes: to tell plans apart, not a promise.
#pragma once

#include "request.h"
#include "types.h"

namespace fastbn::cuda {

// The device's time that a plan takes, in seconds.
double predict_seconds(const Request& request, const Device& device, const Plan& plan);

// Blocks that are resident on the device at once, of kernels that stream what a mapping shares out.
int64_t resident_blocks(const Device& device, Mapping mapping);

}  // namespace fastbn::cuda
