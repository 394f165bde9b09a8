// SPDX-License-Identifier: BSD-3-Clause
//
// The tensor level. A backend supplies three functions on plain structs; ops.cpp checks arguments,
// allocates results and fills the structs; the backend registers the outcome with the dispatcher
// for its device.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "checks.h"
#include "problem.h"

namespace fastbn {

struct Backend {
  void (*training_forward)(const TrainingForward&);
  void (*inference_forward)(const InferenceForward&);
  void (*backward)(const Backward&);
};

using ThreeTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// Returns y and the batch's mean and invstd; blends them into the running statistics. No momentum
// means the average over all batches so far.
ThreeTensors batch_norm_training(const Backend& backend, const at::Tensor& x,
                                 const OptionalTensor& weight, const OptionalTensor& bias,
                                 const OptionalTensor& running_mean,
                                 const OptionalTensor& running_var,
                                 const OptionalTensor& num_batches_tracked,
                                 std::optional<double> momentum, double eps);

// Returns y and copies of the statistics as backward wants them, of no elements unless `save`.
ThreeTensors batch_norm_inference(const Backend& backend, const at::Tensor& x,
                                  const OptionalTensor& weight, const OptionalTensor& bias,
                                  const OptionalTensor& running_mean,
                                  const OptionalTensor& running_var, double eps, bool save);

// Returns dx, dweight (in weight's dtype) and dbias (in the dtype of sums: bias is not at hand), of
// no elements where not wanted.
ThreeTensors batch_norm_backward(const Backend& backend, const at::Tensor& dy, const at::Tensor& x,
                                 const OptionalTensor& weight, const at::Tensor& mean,
                                 const at::Tensor& invstd, bool training, bool want_dx,
                                 bool want_dweight, bool want_dbias);

}  // namespace fastbn
