// SPDX-License-Identifier: BSD-3-Clause
#include "ops.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "checks.h"

namespace fastbn {

namespace {

DType dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return DType::kFloat64;
    case at::kFloat:
      return DType::kFloat32;
    case at::kBFloat16:
      return DType::kBFloat16;
    default:
      return DType::kFloat16;
  }
}

at::ScalarType accumulate_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

at::Tensor empty_vector(const at::Tensor& x, int64_t elements, at::ScalarType type) {
  return at::empty({elements}, x.options().dtype(type));
}

Layout layout_of(const at::Tensor& x, int64_t spatial) {
  if (x.is_contiguous()) return spatial == 1 ? Layout::kNSC : Layout::kNCS;
  const bool channels_last = (x.dim() == 4 && x.is_contiguous(at::MemoryFormat::ChannelsLast)) ||
                             (x.dim() == 5 && x.is_contiguous(at::MemoryFormat::ChannelsLast3d));
  return channels_last ? Layout::kNSC : Layout::kStrided;
}

Problem problem_of(const at::Tensor& x) {
  const int64_t spatial = x.numel() / (x.size(0) * x.size(1));
  return {dtype_of(x), layout_of(x, spatial), x.size(0), x.size(1), spatial};
}

// The memory format of results, as stock's have it.
at::MemoryFormat format_of(const at::Tensor& x) {
  return x.is_contiguous() ? at::MemoryFormat::Contiguous : x.suggest_memory_format();
}

at::Tensor empty_result(const at::Tensor& x) { return at::empty_like(x, format_of(x)); }

// Merges spatial dimensions that follow one another in memory. False if too many are left.
bool set_strides(const at::Tensor& tensor, Activation& activation) {
  activation.batch_stride = tensor.stride(0);
  activation.channel_stride = tensor.stride(1);
  int& dims = activation.spatial_dims;
  dims = 0;
  for (int64_t d = 2; d < tensor.dim(); ++d) {
    const int64_t size = tensor.size(d);
    const int64_t stride = tensor.stride(d);
    if (size == 1) continue;
    if (dims > 0 && activation.strides[dims - 1] == size * stride) {
      activation.sizes[dims - 1] *= size;
      activation.strides[dims - 1] = stride;
      continue;
    }
    if (dims == kMaxSpatialDims) return false;
    activation.sizes[dims] = size;
    activation.strides[dims] = stride;
    ++dims;
  }
  return true;
}

Activation activation_of(const at::Tensor& tensor) {
  Activation activation;
  activation.data = tensor.data_ptr();
  TORCH_CHECK(set_strides(tensor, activation), "batch_norm supports strided inputs of up to ",
              kMaxSpatialDims, " spatial dimensions that cannot be merged, but got shape ",
              tensor.sizes(), " with strides ", tensor.strides(), "; pass x.contiguous()");
  return activation;
}

// A view of the vector's elements in one dimension; a copy where there is none.
ChannelVector vector_of(const OptionalTensor& vector, at::Tensor& keep_alive) {
  if (!vector) return {};
  keep_alive = vector->dim() == 1 ? *vector : vector->reshape({-1});
  return {keep_alive.data_ptr(), dtype_of(keep_alive), keep_alive.stride(0)};
}
// The same of one that will be written, which must be a view.
ChannelVector written_vector_of(const OptionalTensor& vector) {
  if (!vector) return {};
  const at::Tensor view = vector->dim() == 1 ? *vector : vector->view({-1});
  return {view.data_ptr(), dtype_of(view), view.stride(0)};
}
ChannelVector result_vector_of(const at::Tensor& vector) {
  if (vector.numel() == 0) return {};
  return {vector.data_ptr(), dtype_of(vector), 1};
}

void count_batch(const OptionalTensor& num_batches_tracked) {
  if (num_batches_tracked) num_batches_tracked->add_(1);
}

}  // namespace

ThreeTensors batch_norm_training(const Backend& backend, const at::Tensor& x,
                                 const OptionalTensor& weight, const OptionalTensor& bias,
                                 const OptionalTensor& running_mean,
                                 const OptionalTensor& running_var,
                                 const OptionalTensor& num_batches_tracked,
                                 std::optional<double> momentum, double eps) {
  try {
    check_training(x, {weight, bias, running_mean, running_var}, num_batches_tracked, eps);
  } catch (...) {
    count_batch(num_batches_tracked);  // stock counts a batch before it looks at it
    throw;
  }
  const at::Tensor y = empty_result(x);
  const int64_t channels = x.dim() < 2 ? 0 : x.size(1);
  if (x.numel() == 0) {
    count_batch(num_batches_tracked);
    const at::Tensor none = at::zeros({channels}, x.options().dtype(accumulate_type(x)));
    return {y, none, none.clone()};
  }
  const at::Tensor mean = empty_vector(x, channels, accumulate_type(x));
  const at::Tensor invstd = empty_vector(x, channels, accumulate_type(x));

  at::Tensor weight_view, bias_view;
  TrainingForward op;
  op.problem = problem_of(x);
  op.x = activation_of(x);
  op.y = activation_of(y);
  op.weight = vector_of(weight, weight_view);
  op.bias = vector_of(bias, bias_view);
  op.running_mean = written_vector_of(running_mean);
  op.running_var = written_vector_of(running_var);
  if (num_batches_tracked) {
    op.num_batches_tracked = num_batches_tracked->data_ptr<int64_t>();
    num_batches_tracked->unsafeGetTensorImpl()->bump_version();
  }
  op.cumulative = !momentum.has_value();
  op.momentum = momentum.value_or(0);
  op.eps = eps;
  op.mean = result_vector_of(mean);
  op.invstd = result_vector_of(invstd);
  backend.training_forward(op);
  return {y, mean, invstd};
}

ThreeTensors batch_norm_inference(const Backend& backend, const at::Tensor& x,
                                  const OptionalTensor& weight, const OptionalTensor& bias,
                                  const OptionalTensor& running_mean,
                                  const OptionalTensor& running_var, double eps, bool save) {
  check_inference(x, {weight, bias, running_mean, running_var}, eps);
  const at::Tensor y = empty_result(x);
  const int64_t channels = x.dim() < 2 ? 0 : x.size(1);
  const at::Tensor mean = empty_vector(x, save ? channels : 0, accumulate_type(x));
  const at::Tensor invstd = empty_vector(x, save ? channels : 0, accumulate_type(x));
  if (x.numel() == 0) return {y, mean.zero_(), invstd.zero_()};

  at::Tensor weight_view, bias_view, mean_view, var_view;
  InferenceForward op;
  op.problem = problem_of(x);
  op.x = activation_of(x);
  op.y = activation_of(y);
  op.weight = vector_of(weight, weight_view);
  op.bias = vector_of(bias, bias_view);
  op.running_mean = vector_of(running_mean, mean_view);
  op.running_var = vector_of(running_var, var_view);
  op.eps = eps;
  op.mean = result_vector_of(mean);
  op.invstd = result_vector_of(invstd);
  backend.inference_forward(op);
  return {y, mean, invstd};
}

ThreeTensors batch_norm_backward(const Backend& backend, const at::Tensor& dy, const at::Tensor& x,
                                 const OptionalTensor& weight, const at::Tensor& mean,
                                 const at::Tensor& invstd, bool training, bool want_dx,
                                 bool want_dweight, bool want_dbias) {
  check_backward(dy, x, weight, mean, invstd);
  const int64_t channels = x.dim() < 2 ? 0 : x.size(1);
  const at::ScalarType vector_type = weight ? weight->scalar_type() : accumulate_type(x);
  const at::Tensor dx = want_dx ? empty_result(x) : empty_vector(x, 0, x.scalar_type());
  const at::Tensor dweight = empty_vector(x, want_dweight ? channels : 0, vector_type);
  const at::Tensor dbias = empty_vector(x, want_dbias ? channels : 0, vector_type);
  if (x.numel() == 0) return {dx, dweight.zero_(), dbias.zero_()};

  Backward op;
  op.problem = problem_of(x);
  op.training = training;
  // A gradient in another layout is brought to that of x, as stock does.
  const at::Tensor dy_like_x =
      op.problem.layout == Layout::kStrided ? dy : dy.contiguous(format_of(x));
  at::Tensor weight_view, mean_view, invstd_view;
  op.dy = activation_of(dy_like_x);
  op.x = activation_of(x);
  if (want_dx) op.dx = activation_of(dx);
  op.weight = vector_of(weight, weight_view);
  op.mean = vector_of(mean, mean_view);
  op.invstd = vector_of(invstd, invstd_view);
  op.dweight = result_vector_of(dweight);
  op.dbias = result_vector_of(dbias);
  backend.backward(op);
  return {dx, dweight, dbias};
}

}  // namespace fastbn

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
