// SPDX-License-Identifier: BSD-3-Clause
//
// What torch.nn.functional.batch_norm refuses, refused in the same order, with the same exception
// types and words.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

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
void check_elemt(const at::Tensor& x, const at::Tensor& rows, const ForwardVectors& vectors,
                 const OptionalTensor& num_batches_tracked, double eps);
void check_backward(const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& weight,
                    const at::Tensor& mean, const at::Tensor& invstd);

// Rows of partial results, float64 of shape (R, row_length); and a count of values, float64 of one
// element.
void check_rows(const at::Tensor& x, const at::Tensor& rows, int64_t row_length);
void check_count(const at::Tensor& x, const at::Tensor& count);

}  // namespace fastbn
