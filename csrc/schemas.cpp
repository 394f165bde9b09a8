// SPDX-License-Identifier: BSD-3-Clause
//
// The operators torch.ops.fastbn.*; see ops.h for what they return.
#include <torch/library.h>

TORCH_LIBRARY(fastbn, library) {
  library.def(
      "batch_norm_training(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps) -> "
      "(Tensor y, Tensor mean, Tensor invstd)");
  library.def(
      "batch_norm_inference(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, "
      "Tensor? running_var, float eps, bool save) -> (Tensor y, Tensor mean, Tensor invstd)");
  library.def(
      "batch_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor invstd, "
      "bool training, bool want_dx, bool want_dweight, bool want_dbias) -> "
      "(Tensor dx, Tensor dweight, Tensor dbias)");
}
