// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "plan.h"

namespace fastbn::cuda {

// Of a GPU of this machine. Builds without CUDA throw.
const Device& device_properties(int index);

}  // namespace fastbn::cuda
