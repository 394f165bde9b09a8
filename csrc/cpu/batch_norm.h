// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "../problem.h"

namespace fastbn::cpu {

// Results are bitwise the same for any number of threads, and on every run.
void training_forward(const TrainingForward& op);
void inference_forward(const InferenceForward& op);
void backward(const Backward& op);

// By runs of a channel: contiguous (NCS) activations, and any strides.
void training_forward_runs(const TrainingForward& op);
void inference_forward_runs(const InferenceForward& op);
void backward_runs(const Backward& op);

// By tiles of rows and columns: channels last (NSC).
void training_forward_tiles(const TrainingForward& op);
void inference_forward_tiles(const InferenceForward& op);
void backward_tiles(const Backward& op);

}  // namespace fastbn::cpu
