// SPDX-License-Identifier: BSD-3-Clause
//
// How long a plan takes.
#pragma once

#include "plan.h"

namespace fastbn::cuda {

// In seconds of the device's time. A model to tell plans apart, not a promise.
double predict_seconds(const Request& request, const Device& device, const Plan& plan);

// Blocks that live at once on the device, of kernels that stream what a mapping shares out.
int64_t slots(const Device& device, Mapping mapping);

}  // namespace fastbn::cuda
