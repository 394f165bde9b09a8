// SPDX-License-Identifier: BSD-3-Clause
#include "checks.h"

#include <c10/util/Exception.h>

#include <charconv>
#include <string>

#include "../core/partial_rows.h"
#include "messages.h"

namespace fastbn {

namespace {

// As Python writes a float, which is how the messages quote it.
std::string python_repr(double value) {
  char text[32];
  const auto end = std::to_chars(text, text + sizeof text, value).ptr;
  std::string repr(text, end);
  if (repr.find_first_of(".en") == std::string::npos) repr += ".0";
  return repr;
}

std::string python_size(const at::Tensor& x) {
  std::string text = "torch.Size([";
  for (int64_t d = 0; d < x.dim(); ++d) text += (d ? ", " : "") + std::to_string(x.size(d));
  return text + "])";
}

void check_batch_size(const at::Tensor& x) {
  int64_t values = 1;
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (d != 1) values *= x.size(d);
  }
  TORCH_CHECK_VALUE(values != 1, say(messages::one_value_per_channel, python_size(x)));
}

void check_numel(const char* name, const OptionalTensor& vector, int64_t channels) {
  if (!vector) return;
  TORCH_CHECK(vector->numel() == channels,
              say(messages::elements, name, channels, vector->numel()));
}

bool is_supported(at::ScalarType type) {
  return type == at::kDouble || type == at::kFloat || type == at::kBFloat16 || type == at::kHalf;
}

void check_device(const at::Tensor& x, const at::Tensor& other) {
  TORCH_CHECK(other.device() == x.device(), say(messages::device, other.device(), x.device()));
}

// float64 stays among itself; the narrower types mix freely.
void check_vector(const at::Tensor& x, const OptionalTensor& vector) {
  if (!vector) return;
  check_device(x, *vector);
  const char* device = x.is_cpu() ? "CPU" : "CUDA";
  if (x.scalar_type() == at::kDouble) {
    TORCH_CHECK(vector->scalar_type() == at::kDouble, say(messages::mixed_with_float64, device));
  } else {
    TORCH_CHECK(is_supported(vector->scalar_type()) && vector->scalar_type() != at::kDouble,
                say(messages::mixed_dtypes, device));
  }
}

void check_activation(const at::Tensor& x) {
  TORCH_CHECK_NOT_IMPLEMENTED(is_supported(x.scalar_type()), say(messages::dtype, x.scalar_type()));
}

void check_dimensions(const at::Tensor& x) {
  TORCH_CHECK_INDEX(x.dim() >= 2, say(messages::dimensions, x.dim()));
}

// An input without elements is returned as it is, before anything else is looked at.
bool check_empty(const at::Tensor& x, const ForwardVectors& vectors) {
  if (x.numel() != 0) return false;
  for (const OptionalTensor* vector : {&vectors.weight, &vectors.bias}) {
    TORCH_CHECK_INDEX(!*vector || (*vector)->numel() != 0, messages::no_element);
  }
  return true;
}

void check_vectors(const at::Tensor& x, const ForwardVectors& vectors, bool needs_statistics) {
  const int64_t channels = x.dim() < 2 ? 0 : x.size(1);
  check_numel("running_mean", vectors.running_mean, channels);
  TORCH_CHECK(vectors.running_mean || !needs_statistics,
              say(messages::no_statistics, "running_mean"));
  check_numel("running_var", vectors.running_var, channels);
  TORCH_CHECK(vectors.running_var || !needs_statistics,
              say(messages::no_statistics, "running_var"));
  check_numel("weight", vectors.weight, channels);
  check_numel("bias", vectors.bias, channels);
  check_dimensions(x);
  TORCH_CHECK_VALUE(vectors.running_mean.has_value() == vectors.running_var.has_value(),
                    messages::one_statistic);
  check_activation(x);
  check_vector(x, vectors.running_mean);
  check_vector(x, vectors.running_var);
  check_vector(x, vectors.weight);
  check_vector(x, vectors.bias);
}

void check_training_eps(double eps) {
  TORCH_CHECK_VALUE(!(eps <= 0), say(messages::training_eps, python_repr(eps)));
}

void check_counter(const at::Tensor& x, const OptionalTensor& num_batches_tracked) {
  if (!num_batches_tracked) return;
  TORCH_CHECK(
      num_batches_tracked->scalar_type() == at::kLong && num_batches_tracked->numel() == 1,
      say(messages::counter, num_batches_tracked->numel(), num_batches_tracked->scalar_type()));
  check_device(x, *num_batches_tracked);
}

void check_float64(const at::Tensor& x, const char* name, const at::Tensor& given) {
  TORCH_CHECK(given.scalar_type() == at::kDouble,
              say(messages::float64, name, given.scalar_type()));
  check_device(x, given);
}

// Rows of partial results: float64 of shape (R, row_length).
void check_rows(const at::Tensor& x, const at::Tensor& rows, int64_t row_length) {
  TORCH_CHECK(rows.dim() == 2 && rows.size(0) > 0 && rows.size(1) == row_length,
              say(messages::rows, row_length, x.sizes(), rows.sizes()));
  check_float64(x, "rows", rows);
}

// What x is normalized with, but for the dtypes of mean and invstd.
void check_normalization(const at::Tensor& x, const OptionalTensor& weight, const at::Tensor& mean,
                         const at::Tensor& invstd) {
  check_activation(x);
  check_dimensions(x);
  check_numel("weight", weight, x.size(1));
  check_numel("mean", mean, x.size(1));
  check_numel("invstd", invstd, x.size(1));
  check_vector(x, weight);
}

// The same, where there is an epilogue, of bias and of the dtypes.
void check_pre_activation(const at::Tensor& x, const OptionalTensor& bias, const at::Tensor& mean,
                          const at::Tensor& invstd) {
  check_numel("bias", bias, x.size(1));
  check_vector(x, bias);
  check_float64(x, "mean", mean);
  check_float64(x, "invstd", invstd);
}

// What gradients of any kind are computed from, but for the dtypes of mean and invstd.
void check_gradient(const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& weight,
                    const at::Tensor& mean, const at::Tensor& invstd) {
  TORCH_CHECK(dy.sizes() == x.sizes(), say(messages::gradient_shape, dy.sizes(), x.sizes()));
  TORCH_CHECK(dy.scalar_type() == x.scalar_type(),
              say(messages::gradient_dtype, dy.scalar_type(), x.scalar_type()));
  check_vector(x, dy);
  if (x.numel() > 0) check_normalization(x, weight, mean, invstd);
}

// The number of values of a channel in all rows: float64 of one element.
void check_count(const at::Tensor& x, const at::Tensor& count) {
  TORCH_CHECK(count.numel() == 1, say(messages::count, count.numel()));
  check_float64(x, "count", count);
}

}  // namespace

void check_training(const at::Tensor& x, const ForwardVectors& vectors,
                    const OptionalTensor& num_batches_tracked, double eps) {
  check_batch_size(x);
  check_training_eps(eps);
  if (check_empty(x, vectors)) return;
  check_vectors(x, vectors, /*needs_statistics=*/false);
  check_counter(x, num_batches_tracked);
}

void check_eval(const at::Tensor& x, const ForwardVectors& vectors, double eps) {
  TORCH_CHECK_VALUE(!(eps < 0), say(messages::eps, python_repr(eps)));
  if (check_empty(x, vectors)) return;
  check_vectors(x, vectors, /*needs_statistics=*/true);
}

void check_stats(const at::Tensor& x) {
  check_dimensions(x);
  check_activation(x);
}

void check_combine_apply(const at::Tensor& x, const at::Tensor& rows, const ForwardVectors& vectors,
                         const OptionalTensor& num_batches_tracked, double eps) {
  check_training_eps(eps);
  check_vectors(x, vectors, /*needs_statistics=*/false);
  check_rows(x, rows, moments_row_length(x.size(1)));
  check_counter(x, num_batches_tracked);
}

void check_backward(const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& weight,
                    const at::Tensor& mean, const at::Tensor& invstd) {
  check_gradient(dy, x, weight, mean, invstd);
  if (x.numel() == 0) return;
  check_vector(x, mean);
  check_vector(x, invstd);
}

void check_act_apply(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                     const at::Tensor& mean, const at::Tensor& invstd) {
  if (x.numel() == 0) return;
  check_normalization(x, weight, mean, invstd);
  check_pre_activation(x, bias, mean, invstd);
}

void check_act_backward(const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& weight,
                        const OptionalTensor& bias, const at::Tensor& mean,
                        const at::Tensor& invstd) {
  check_gradient(dy, x, weight, mean, invstd);
  if (x.numel() > 0) check_pre_activation(x, bias, mean, invstd);
}

void check_mask(const at::Tensor& x, const OptionalTensor& mask, const OptionalTensor& residual,
                int64_t mask_bytes) {
  if (!mask) return;
  check_device(x, *mask);
  TORCH_CHECK(mask_bytes > 0 && !residual && mask->scalar_type() == at::kByte &&
                  mask->numel() == mask_bytes && mask->is_contiguous(),
              say(messages::mask, mask_bytes, mask->numel(), mask->scalar_type()));
}

ActivationFunction check_epilogue(const at::Tensor& x, const OptionalTensor& residual,
                                  std::string_view activation) {
  if (residual) {
    check_device(x, *residual);
    TORCH_CHECK(residual->sizes() == x.sizes(),
                say(messages::residual_shape, residual->sizes(), x.sizes()));
    TORCH_CHECK(residual->scalar_type() == x.scalar_type(),
                say(messages::residual_dtype, residual->scalar_type(), x.scalar_type()));
  }
#define FASTBN_FUNCTION(Function, name) \
  if (activation == name) return ActivationFunction::k##Function;
  FASTBN_ACTIVATION_FUNCTIONS(FASTBN_FUNCTION)
#undef FASTBN_FUNCTION
  TORCH_CHECK_VALUE(false, say(messages::activation, activation));
}

void check_backward_combine_apply(const at::Tensor& dy, const at::Tensor& x,
                                  const OptionalTensor& weight, const at::Tensor& mean,
                                  const at::Tensor& invstd, const at::Tensor& rows,
                                  const at::Tensor& count) {
  check_backward(dy, x, weight, mean, invstd);
  check_dimensions(x);
  check_rows(x, rows, grad_sums_row_length(x.size(1)));
  check_count(x, count);
}

}  // namespace fastbn
