// SPDX-License-Identifier: BSD-3-Clause
//
// Launches a planned operation. `stream` is a cudaStream_t; `workspace` has the plan's size and
// begins with kCounters zeros, which the kernels leave behind them. Throws std::runtime_error,
// naming kernel, shape and plan, if a launch fails.
#pragma once

#include "../problem.h"
#include "plan.h"

namespace fastbn::cuda {

void training_forward(const TrainingForward& op, const Plan& plan, void* workspace, void* stream);
void inference_forward(const InferenceForward& op, const Plan& plan, void* stream);
void backward(const Backward& op, const Plan& plan, void* workspace, void* stream);

}  // namespace fastbn::cuda
