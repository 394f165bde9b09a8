// SPDX-License-Identifier: BSD-3-Clause
//
// The plans that an algorithm has for a problem on a device: those that fit, complete but for the
// time they are predicted to take.
#pragma once

#include <functional>
#include <string>

#include "request.h"
#include "types.h"

namespace fastbn::cuda {

using Consider = std::function<void(Plan&)>;

// Calls consider(plan) for each.
void for_each_candidate(const Request& request, const Device& device, Algorithm algorithm,
                        const Consider& consider);

// Why an algorithm has none, for messages.
std::string why_not(const Request& request, const Device& device, Algorithm algorithm);

}  // namespace fastbn::cuda
