// SPDX-License-Identifier: BSD-3-Clause
//
// What torch.nn.functional.batch_norm refuses, refused in the same order, with the same exception
// types and words.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "../core/activation_table.h"

namespace fastbn {

using OptionalTensor = std::optional<at::Tensor>;

// The tensors a forward takes besides x.
struct ForwardVectors {
  const OptionalTensor &weight, &bias, &running_mean, &running_var;
};

void check_training(const at::Tensor& x, const ForwardVectors& vectors,
                    const OptionalTensor& num_batches_tracked, double eps);
void check_eval(const at::Tensor& x, const ForwardVectors& vectors, double eps);
void check_stats(const at::Tensor& x);
void check_combine_apply(const at::Tensor& x, const at::Tensor& rows, const ForwardVectors& vectors,
                         const OptionalTensor& num_batches_tracked, double eps);
void check_backward(const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& weight,
                    const at::Tensor& mean, const at::Tensor& invstd);
// With an epilogue, whose mean and invstd are float64.
void check_act_apply(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                     const at::Tensor& mean, const at::Tensor& invstd);
void check_act_backward(const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& weight,
                        const OptionalTensor& bias, const at::Tensor& mean,
                        const at::Tensor& invstd);
// `mask_bytes` is how many bytes a mask must have, if one is given, and then no residual is.
void check_mask(const at::Tensor& x, const OptionalTensor& mask, const OptionalTensor& residual,
                int64_t mask_bytes);
// Returns the activation function of that name.
ActivationFunction check_epilogue(const at::Tensor& x, const OptionalTensor& residual,
                                  std::string_view activation);
void check_backward_combine_apply(const at::Tensor& dy, const at::Tensor& x,
                                  const OptionalTensor& weight, const at::Tensor& mean,
                                  const at::Tensor& invstd, const at::Tensor& rows,
                                  const at::Tensor& count);

}  // namespace fastbn
