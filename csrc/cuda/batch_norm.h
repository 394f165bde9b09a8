// SPDX-License-Identifier: BSD-3-Clause
//
// Launches a planned operation. `stream` is a cudaStream_t; `workspace` is what the plan asks for.
// Throws std::runtime_error, naming shape and plan, if a launch fails or a tensor map is not to be
// had.
#pragma once

#include "../core/problem.h"
#include "planner/types.h"

namespace fastbn::cuda {

void training_forward(const TrainingForward& op, const Plan& plan, const Workspace& workspace,
                      void* stream);
void eval_forward(const EvalForward& op, const Plan& plan, void* stream);
void backward(const Backward& op, const Plan& plan, const Workspace& workspace, void* stream);

// Completes the current device's properties by what the driver says of these kernels: whether they
// can live all at once, whether their machine code knows the copy engine, and how many clusters run
// at once.
void query_persistence(Device& device);

}  // namespace fastbn::cuda
