// SPDX-License-Identifier: BSD-3-Clause
#include "ops.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "../core/mask.h"
#include "../core/partial_rows.h"
#include "tensors.h"

namespace fastbn {

namespace {

void count_batch(const OptionalTensor& num_batches_tracked) {
  if (num_batches_tracked) num_batches_tracked->add_(1);
}

RunningStatistics running_statistics(const OptionalTensor& running_mean,
                                     const OptionalTensor& running_var,
                                     const OptionalTensor& num_batches_tracked,
                                     std::optional<double> momentum) {
  RunningStatistics running;
  running.mean = updated_vector(running_mean);
  running.var = updated_vector(running_var);
  if (num_batches_tracked) {
    running.num_batches_tracked = num_batches_tracked->mutable_data_ptr<int64_t>();
    num_batches_tracked->unsafeGetTensorImpl()->bump_version();
  }
  running.cumulative = !momentum.has_value();
  running.momentum = momentum.value_or(0);
  return running;
}

// What follows batch norm, as callers name it.
struct EpilogueArguments {
  const OptionalTensor& residual;
  const OptionalTensor mask;  // of backward
  std::string_view activation;
  double parameter;
  bool want_mask;  // of forward
};

at::Tensor empty_mask(const at::Tensor& x, int64_t bytes) {
  return at::empty({bytes}, x.options().dtype(at::kByte));
}

// What holds the memory of an epilogue, and of x; the mask is undefined where none is written.
struct EpilogueTensors {
  at::Tensor x, residual, mask;
};

// The mask that forward returns: of no elements where there is none. Nobody asks for one without an
// epilogue.
at::Tensor mask_result(const at::Tensor& x, const EpilogueArguments* epilogue,
                       const EpilogueTensors& tensors) {
  return epilogue == nullptr || tensors.mask.defined() ? tensors.mask : empty_mask(x, 0);
}

// Leaves in `tensors` what the operation is to read and, in forward, the mask to write.
Epilogue epilogue_of(const at::Tensor& x, const Problem& problem, const EpilogueArguments* given,
                     EpilogueTensors& tensors) {
  tensors.x = x;
  if (given == nullptr) return {};
  Epilogue epilogue;
  epilogue.function = check_epilogue(x, given->residual, given->activation);
  epilogue.parameter = given->parameter;
  const int64_t bytes = has_two_slopes(epilogue.function) ? mask_bytes(problem) : 0;
  check_mask(x, given->mask, given->residual, bytes);
  const bool writes_mask = given->want_mask && given->residual && bytes > 0;
  const bool has_mask = given->mask || writes_mask;
  if (writes_mask) {
    tensors.mask = empty_mask(x, bytes);
    epilogue.mask_out = tensors.mask.mutable_data_ptr<uint8_t>();
  }
  if (given->mask) epilogue.mask = given->mask->const_data_ptr<uint8_t>();
  if (x.numel() == 0) return epilogue;
  tensors.x = in_vectors(x, has_mask);
  if (given->residual) {
    tensors.residual = in_vectors(like(x, problem, *given->residual), has_mask);
    epilogue.residual = input(tensors.residual);
  }
  return epilogue;
}

// Without an epilogue statistics are saved in the dtype of sums, else in float64.
at::ScalarType saved_type(const at::Tensor& x, const EpilogueArguments* epilogue) {
  return epilogue == nullptr ? accumulate_type(x) : at::kDouble;
}

ActForwardResults train(const Backend& backend, const at::Tensor& x, const OptionalTensor& weight,
                        const OptionalTensor& bias, const OptionalTensor& running_mean,
                        const OptionalTensor& running_var,
                        const OptionalTensor& num_batches_tracked, std::optional<double> momentum,
                        double eps, const EpilogueArguments* epilogue) {
  at::Tensor y, mean, invstd, weight_view, bias_view;
  EpilogueTensors tensors;
  TrainingForward op;
  try {
    check_training(x, {weight, bias, running_mean, running_var}, num_batches_tracked, eps);
    op.problem = problem_of(x);
    op.epilogue = epilogue_of(x, op.problem, epilogue, tensors);
    y = empty_result(x);
    if (x.numel() > 0) {
      mean = empty_vector(x, channels_of(x), saved_type(x, epilogue));
      invstd = empty_vector(x, channels_of(x), saved_type(x, epilogue));
      op.count = static_cast<double>(op.problem.per_channel());
      op.x = input(tensors.x);
      op.y = output(y);
      op.weight = input_vector(weight, weight_view);
      op.bias = input_vector(bias, bias_view);
      op.running = running_statistics(running_mean, running_var, num_batches_tracked, momentum);
      op.eps = eps;
      op.mean = output_vector(mean);
      op.invstd = output_vector(invstd);
    }
  } catch (...) {
    count_batch(num_batches_tracked);  // stock counts a batch before it looks at it
    throw;
  }
  if (x.numel() == 0) {
    count_batch(num_batches_tracked);
    const auto options = x.options().dtype(saved_type(x, epilogue));
    return {y, at::zeros({channels_of(x)}, options), at::zeros({channels_of(x)}, options),
            mask_result(x, epilogue, tensors)};
  }
  TORCH_INTERNAL_ASSERT(disjoint(op.problem, op.y, op.x) &&
                        disjoint(op.problem, op.y, op.epilogue.residual));
  backend.training_forward(op);
  return {y, mean, invstd, mask_result(x, epilogue, tensors)};
}

ActForwardResults evaluate(const Backend& backend, const at::Tensor& x,
                           const OptionalTensor& weight, const OptionalTensor& bias,
                           const OptionalTensor& running_mean, const OptionalTensor& running_var,
                           double eps, bool save, const EpilogueArguments* epilogue) {
  check_eval(x, {weight, bias, running_mean, running_var}, eps);
  at::Tensor weight_view, bias_view, mean_view, var_view;
  EpilogueTensors tensors;
  EvalForward op;
  op.problem = problem_of(x);
  op.epilogue = epilogue_of(x, op.problem, epilogue, tensors);
  const at::Tensor y = empty_result(x);
  const int64_t saved = save ? channels_of(x) : 0;
  const at::Tensor mean = empty_vector(x, saved, saved_type(x, epilogue));
  const at::Tensor invstd = empty_vector(x, saved, saved_type(x, epilogue));
  if (x.numel() == 0) {
    return {y, mean.zero_(), invstd.zero_(), mask_result(x, epilogue, tensors)};
  }

  op.x = input(tensors.x);
  op.y = output(y);
  op.weight = input_vector(weight, weight_view);
  op.bias = input_vector(bias, bias_view);
  op.running_mean = input_vector(running_mean, mean_view);
  op.running_var = input_vector(running_var, var_view);
  op.eps = eps;
  op.mean = output_vector(mean);
  op.invstd = output_vector(invstd);
  TORCH_INTERNAL_ASSERT(disjoint(op.problem, op.y, op.x) &&
                        disjoint(op.problem, op.y, op.epilogue.residual));
  backend.eval_forward(op);
  return {y, mean, invstd, mask_result(x, epilogue, tensors)};
}

// The gradients of a training or an evaluation, by all steps or by some.
struct Differentiation {
  Steps steps = Steps::kAll;
  bool training = true;
  bool want_dx = true;
  bool want_dresidual = false;
  bool want_dweight = true;
  bool want_dbias = true;
  PartialRows partials;
  const double* total_count = nullptr;
};

// dx, dresidual, dweight and dbias.
using AllGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

AllGradients differentiate(const Backend& backend, const at::Tensor& dy, const at::Tensor& x,
                           const OptionalTensor& weight, const OptionalTensor& bias,
                           const at::Tensor& mean, const at::Tensor& invstd,
                           const Differentiation& wanted, const EpilogueArguments* epilogue) {
  const int64_t channels = channels_of(x);
  const at::ScalarType weight_type = weight ? weight->scalar_type() : accumulate_type(x);
  const at::Tensor none = empty_vector(x, 0, x.scalar_type());
  const at::Tensor dx = wanted.want_dx ? empty_result(x) : none;
  const at::Tensor dresidual = wanted.want_dresidual ? empty_result(x) : none;
  const at::Tensor dweight = empty_vector(x, wanted.want_dweight ? channels : 0, weight_type);
  const at::Tensor dbias = empty_vector(x, wanted.want_dbias ? channels : 0, accumulate_type(x));
  at::Tensor weight_view, bias_view, mean_view, invstd_view;
  EpilogueTensors tensors;
  Backward op;
  op.problem = problem_of(x);
  op.epilogue = epilogue_of(x, op.problem, epilogue, tensors);
  if (x.numel() == 0) return {dx, dresidual, dweight.zero_(), dbias.zero_()};

  op.training = wanted.training;
  op.steps = wanted.steps;
  op.count = static_cast<double>(op.problem.per_channel());
  op.total_count = wanted.total_count;
  op.partials = wanted.partials;
  // A gradient in another layout is brought to that of x, as stock does.
  const at::Tensor dy_like_x = in_vectors(like(x, op.problem, dy), op.epilogue.mask != nullptr);
  op.dy = input(dy_like_x);
  op.x = input(tensors.x);
  if (wanted.want_dx) op.dx = output(dx);
  if (wanted.want_dresidual) op.dresidual = output(dresidual);
  op.weight = input_vector(weight, weight_view);
  op.bias = input_vector(bias, bias_view);
  op.mean = input_vector(mean, mean_view);
  op.invstd = input_vector(invstd, invstd_view);
  op.dweight = output_vector(dweight);
  op.dbias = output_vector(dbias);
  for (const OutputActivation* gradient : {&op.dx, &op.dresidual}) {
    for (const InputActivation* read : {&op.x, &op.dy, &op.epilogue.residual}) {
      TORCH_INTERNAL_ASSERT(disjoint(op.problem, *gradient, *read));
    }
  }
  backend.backward(op);
  return {dx, dresidual, dweight, dbias};
}

}  // namespace

ForwardResults batch_norm_training(const Backend& backend, const at::Tensor& x,
                                   const OptionalTensor& weight, const OptionalTensor& bias,
                                   const OptionalTensor& running_mean,
                                   const OptionalTensor& running_var,
                                   const OptionalTensor& num_batches_tracked,
                                   std::optional<double> momentum, double eps) {
  auto [y, mean, invstd, mask] = train(backend, x, weight, bias, running_mean, running_var,
                                       num_batches_tracked, momentum, eps, nullptr);
  return {y, mean, invstd};
}

ActForwardResults batch_norm_act_training(
    const Backend& backend, const at::Tensor& x, const OptionalTensor& residual,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
    std::optional<double> momentum, double eps, std::string_view activation, double parameter,
    bool want_mask) {
  const EpilogueArguments epilogue{residual, std::nullopt, activation, parameter, want_mask};
  return train(backend, x, weight, bias, running_mean, running_var, num_batches_tracked, momentum,
               eps, &epilogue);
}

ForwardResults batch_norm_eval(const Backend& backend, const at::Tensor& x,
                               const OptionalTensor& weight, const OptionalTensor& bias,
                               const OptionalTensor& running_mean,
                               const OptionalTensor& running_var, double eps, bool save) {
  auto [y, mean, invstd, mask] =
      evaluate(backend, x, weight, bias, running_mean, running_var, eps, save, nullptr);
  return {y, mean, invstd};
}

ActForwardResults batch_norm_act_eval(const Backend& backend, const at::Tensor& x,
                                      const OptionalTensor& residual, const OptionalTensor& weight,
                                      const OptionalTensor& bias,
                                      const OptionalTensor& running_mean,
                                      const OptionalTensor& running_var, double eps, bool save,
                                      std::string_view activation, double parameter) {
  const EpilogueArguments epilogue{residual, std::nullopt, activation, parameter, save};
  return evaluate(backend, x, weight, bias, running_mean, running_var, eps, save, &epilogue);
}

at::Tensor batch_norm_act_apply(const Backend& backend, const at::Tensor& x,
                                const OptionalTensor& residual, const OptionalTensor& weight,
                                const OptionalTensor& bias, const at::Tensor& mean,
                                const at::Tensor& invstd, bool training,
                                std::string_view activation, double parameter) {
  check_act_apply(x, weight, bias, mean, invstd);
  const EpilogueArguments epilogue{residual, std::nullopt, activation, parameter,
                                   /*want_mask=*/false};
  at::Tensor weight_view, bias_view, mean_view, invstd_view;
  EpilogueTensors tensors;
  EvalForward op;
  op.problem = problem_of(x);
  op.epilogue = epilogue_of(x, op.problem, &epilogue, tensors);
  const at::Tensor y = empty_result(x);
  if (x.numel() == 0) return y;

  op.x = input(tensors.x);
  op.y = output(y);
  op.weight = input_vector(weight, weight_view);
  op.bias = input_vector(bias, bias_view);
  op.saved = {input_vector(mean, mean_view), input_vector(invstd, invstd_view), training};
  TORCH_INTERNAL_ASSERT(disjoint(op.problem, op.y, op.x) &&
                        disjoint(op.problem, op.y, op.epilogue.residual));
  backend.eval_forward(op);
  return y;
}

Gradients batch_norm_backward(const Backend& backend, const at::Tensor& dy, const at::Tensor& x,
                              const OptionalTensor& weight, const at::Tensor& mean,
                              const at::Tensor& invstd, bool training, bool want_dx,
                              bool want_dweight, bool want_dbias) {
  check_backward(dy, x, weight, mean, invstd);
  Differentiation wanted;
  wanted.training = training;
  wanted.want_dx = want_dx;
  wanted.want_dweight = want_dweight;
  wanted.want_dbias = want_dbias;
  auto [dx, dresidual, dweight, dbias] =
      differentiate(backend, dy, x, weight, std::nullopt, mean, invstd, wanted, nullptr);
  return {dx, dweight, dbias};
}

AllGradients batch_norm_act_backward(const Backend& backend, const at::Tensor& dy,
                                     const at::Tensor& x, const OptionalTensor& residual,
                                     const OptionalTensor& mask, const OptionalTensor& weight,
                                     const OptionalTensor& bias, const at::Tensor& mean,
                                     const at::Tensor& invstd, bool training,
                                     std::string_view activation, double parameter, bool want_dx,
                                     bool want_dresidual, bool want_dweight, bool want_dbias) {
  check_act_backward(dy, x, weight, bias, mean, invstd);
  const EpilogueArguments epilogue{residual, mask, activation, parameter, /*want_mask=*/false};
  Differentiation wanted;
  wanted.training = training;
  wanted.want_dx = want_dx;
  wanted.want_dresidual = want_dresidual;
  wanted.want_dweight = want_dweight;
  wanted.want_dbias = want_dbias;
  return differentiate(backend, dy, x, weight, bias, mean, invstd, wanted, &epilogue);
}

at::Tensor batch_norm_stats(const Backend& backend, const at::Tensor& x, bool additive) {
  check_stats(x);
  const auto options = x.options().dtype(at::kDouble);
  if (x.numel() == 0) return at::zeros({moments_row_length(x.size(1))}, options);
  const at::Tensor row = at::empty({moments_row_length(x.size(1))}, options);
  TrainingForward op;
  op.problem = problem_of(x);
  op.steps = Steps::kReduce;
  op.count = static_cast<double>(op.problem.per_channel());
  op.x = input(x);
  op.partials.out = row.mutable_data_ptr<double>();
  op.partials.rows = 1;
  op.partials.additive = additive;
  backend.training_forward(op);
  return row;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> batch_norm_combine_apply(
    const Backend& backend, const at::Tensor& x, const at::Tensor& rows, bool additive,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
    std::optional<double> momentum, double eps) {
  check_combine_apply(x, rows, {weight, bias, running_mean, running_var}, num_batches_tracked, eps);
  const at::Tensor y = empty_result(x);
  const at::Tensor mean = empty_vector(x, x.size(1), accumulate_type(x));
  const at::Tensor invstd = empty_vector(x, x.size(1), accumulate_type(x));
  const at::Tensor count = at::empty({1}, rows.options());
  const at::Tensor all_rows = rows.contiguous();
  if (x.size(1) == 0) {
    count_batch(num_batches_tracked);
    return {y, mean, invstd, count.zero_()};
  }

  at::Tensor weight_view, bias_view;
  TrainingForward op;
  op.problem = problem_of(x);
  op.steps = Steps::kApply;
  op.x = input(x);
  op.y = output(y);
  op.weight = input_vector(weight, weight_view);
  op.bias = input_vector(bias, bias_view);
  op.running = running_statistics(running_mean, running_var, num_batches_tracked, momentum);
  // Blocks that finalize read the counter while others run: for an average it is counted before.
  op.running.counted = !momentum.has_value();
  op.eps = eps;
  op.mean = output_vector(mean);
  op.invstd = output_vector(invstd);
  op.partials.in = all_rows.const_data_ptr<double>();
  op.partials.rows = rows.size(0);
  op.partials.additive = additive;
  op.total_count = count.mutable_data_ptr<double>();
  TORCH_INTERNAL_ASSERT(disjoint(op.problem, op.y, op.x));
  if (op.running.counted) count_batch(num_batches_tracked);
  backend.training_forward(op);
  return {y, mean, invstd, count};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_backward_reduce(
    const Backend& backend, const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& weight,
    const at::Tensor& mean, const at::Tensor& invstd, bool want_dweight, bool want_dbias) {
  check_backward(dy, x, weight, mean, invstd);
  const at::Tensor row =
      at::empty({grad_sums_row_length(channels_of(x))}, x.options().dtype(at::kDouble));
  if (x.numel() == 0) row.zero_();
  Differentiation wanted;
  wanted.steps = Steps::kReduce;
  wanted.want_dx = false;
  wanted.want_dweight = want_dweight;
  wanted.want_dbias = want_dbias;
  wanted.partials.out = row.mutable_data_ptr<double>();
  wanted.partials.rows = 1;
  auto [dx, dresidual, dweight, dbias] =
      differentiate(backend, dy, x, weight, std::nullopt, mean, invstd, wanted, nullptr);
  return {row, dweight, dbias};
}

at::Tensor batch_norm_backward_combine_apply(const Backend& backend, const at::Tensor& dy,
                                             const at::Tensor& x, const OptionalTensor& weight,
                                             const at::Tensor& mean, const at::Tensor& invstd,
                                             const at::Tensor& rows, const at::Tensor& count) {
  check_backward_combine_apply(dy, x, weight, mean, invstd, rows, count);
  const at::Tensor all_rows = rows.contiguous();
  Differentiation wanted;
  wanted.steps = Steps::kApply;
  wanted.want_dweight = false;
  wanted.want_dbias = false;
  wanted.partials.in = all_rows.const_data_ptr<double>();
  wanted.partials.rows = rows.size(0);
  wanted.total_count = count.const_data_ptr<double>();
  return std::get<0>(
      differentiate(backend, dy, x, weight, std::nullopt, mean, invstd, wanted, nullptr));
}

}  // namespace fastbn
