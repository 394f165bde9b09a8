// SPDX-License-Identifier: BSD-3-Clause
//
// Which algorithm, grid and shared memory for a problem on a device. A pure function of its
// arguments, on the host: it can be asked about GPUs that are not there.
#pragma once

#include <string>
#include <vector>

#include "request.h"
#include "types.h"

namespace fastbn::cuda {

// Devices by their published properties.
const std::vector<Device>& known_devices();

// The plan that is predicted to be fast and, of equally fast ones, moves the fewest bytes; plan.cpp
// says what equal is, and what a grid has to gain. `forced` names an algorithm to use whatever the
// cost, where there is a choice: "auto", "two_pass", "one_block", "persistent_block",
// "persistent_cluster" or "persistent_grid". Throws std::invalid_argument if it is none of them or
// does not fit.
Plan plan(const Request& request, const Device& device, const std::string& forced = "auto");

// The plans that were chosen from: the best of each algorithm that fits.
std::vector<Plan> alternatives(const Request& request, const Device& device);

const char* name(Algorithm algorithm);
const char* name(Mapping mapping);

// Today's name of an algorithm that was called otherwise in version 0.1; else the name itself.
std::string current_name(const std::string& algorithm);

// One line for messages: the problem's shape and what was planned for it.
std::string describe(const Problem& problem, const Plan& plan);

}  // namespace fastbn::cuda
