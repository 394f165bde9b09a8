// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "types.h"

namespace fastbn::cuda {

// What the planner needs to know of an operation.
Request request(const TrainingForward& op);
Request request(const EvalForward& op);
Request request(const Backward& op);

}  // namespace fastbn::cuda
