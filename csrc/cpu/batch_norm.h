// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "../core/problem.h"

namespace fastbn::cpu {

// Results are bitwise the same for any number of threads, and every time.
void training_forward(const TrainingForward& op);
void eval_forward(const EvalForward& op);
void backward(const Backward& op);

// Contiguous activations, a row of a channel at a time; and activations of any strides, which are
// packed into such rows.
namespace contiguous {
void training_forward(const TrainingForward& op);
void eval_forward(const EvalForward& op);
void backward(const Backward& op);
}  // namespace contiguous

// Channels-last activations, a row of channels at a time.
namespace channels_last {
void training_forward(const TrainingForward& op);
void eval_forward(const EvalForward& op);
void backward(const Backward& op);
}  // namespace channels_last

}  // namespace fastbn::cpu
