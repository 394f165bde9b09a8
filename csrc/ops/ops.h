// SPDX-License-Identifier: BSD-3-Clause
//
// The tensor level. ops.cpp checks arguments, allocates results and fills the structs of problem.h;
// a backend computes on these, and registration.h gives its operators to the dispatcher.
//
// To add an operator, declare it here, add it to the table below and write it in ops.cpp and
// fastbn/ops.py; backends need to know of it only where it takes steps that no other takes.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "../core/problem.h"
#include "checks.h"

namespace fastbn {

struct Backend {
  void (*training_forward)(const TrainingForward&);
  void (*eval_forward)(const EvalForward&);
  void (*backward)(const Backward&);
};

// Every operator and its signature, as OPERATOR(name, signature).
#define FASTBN_OPERATORS(OPERATOR)                                                                 \
  OPERATOR(batch_norm_training,                                                                    \
           "(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "                   \
           "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps)" \
           " -> (Tensor y, Tensor mean, Tensor invstd)")                                           \
  OPERATOR(batch_norm_eval,                                                                        \
           "(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, "  \
           "float eps, bool save) -> (Tensor y, Tensor mean, Tensor invstd)")                      \
  OPERATOR(batch_norm_backward,                                                                    \
           "(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor invstd, bool training, "     \
           "bool want_dx, bool want_dweight, bool want_dbias) -> "                                 \
           "(Tensor dx, Tensor dweight, Tensor dbias)")                                            \
  OPERATOR(batch_norm_act_training,                                                                \
           "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, "                           \
           "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, "  \
           "float? momentum, float eps, str activation, float parameter, bool want_mask)"          \
           " -> (Tensor y, Tensor mean, Tensor invstd, Tensor mask)")                              \
  OPERATOR(batch_norm_act_eval,                                                                    \
           "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? running_mean, "     \
           "Tensor? running_var, float eps, bool save, str activation, float parameter)"           \
           " -> (Tensor y, Tensor mean, Tensor invstd, Tensor mask)")                              \
  OPERATOR(batch_norm_act_apply,                                                                   \
           "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor mean, "              \
           "Tensor invstd, bool training, str activation, float parameter) -> Tensor y")           \
  OPERATOR(batch_norm_act_backward,                                                                \
           "(Tensor dy, Tensor x, Tensor? residual, Tensor? mask, Tensor? weight, Tensor? bias, "  \
           "Tensor mean, Tensor invstd, bool training, str activation, float parameter, "          \
           "bool want_dx, bool want_dresidual, bool want_dweight, bool want_dbias) -> "            \
           "(Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)")                          \
  OPERATOR(batch_norm_stats, "(Tensor x, bool additive) -> Tensor row")                            \
  OPERATOR(batch_norm_combine_apply,                                                               \
           "(Tensor x, Tensor rows, bool additive, Tensor? weight, Tensor? bias, "                 \
           "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, "  \
           "float? momentum, float eps) -> "                                                       \
           "(Tensor y, Tensor mean, Tensor invstd, Tensor count)")                                 \
  OPERATOR(batch_norm_backward_reduce,                                                             \
           "(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor invstd, bool want_dweight, " \
           "bool want_dbias) -> (Tensor row, Tensor dweight, Tensor dbias)")                       \
  OPERATOR(batch_norm_backward_combine_apply,                                                      \
           "(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor invstd, Tensor rows, "       \
           "Tensor count) -> Tensor dx")

// y, mean and invstd.
using ForwardResults = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
// y, mean, invstd and a mask.
using ActForwardResults = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
// dx, dweight (in weight's dtype) and dbias (in the dtype of sums: bias is not at hand), of no
// elements where not wanted.
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// All steps of training: blends the batch's statistics into the running ones. No momentum means the
// average over all batches so far.
ForwardResults batch_norm_training(const Backend& backend, const at::Tensor& x,
                                   const OptionalTensor& weight, const OptionalTensor& bias,
                                   const OptionalTensor& running_mean,
                                   const OptionalTensor& running_var,
                                   const OptionalTensor& num_batches_tracked,
                                   std::optional<double> momentum, double eps);

// Evaluation: batch norm with given statistics. Returns copies of them as backward wants them, of
// no elements unless `save`.
ForwardResults batch_norm_eval(const Backend& backend, const at::Tensor& x,
                               const OptionalTensor& weight, const OptionalTensor& bias,
                               const OptionalTensor& running_mean,
                               const OptionalTensor& running_var, double eps, bool save);

Gradients batch_norm_backward(const Backend& backend, const at::Tensor& dy, const at::Tensor& x,
                              const OptionalTensor& weight, const at::Tensor& mean,
                              const at::Tensor& invstd, bool training, bool want_dx,
                              bool want_dweight, bool want_dbias);

// The same with an epilogue: y = activation(batch_norm(x) + residual). The residual, if any, is
// like x; `parameter` is that of an activation that has one, else 0. The saved statistics are
// float64, from which backward computes the same pre-activation again.
//
// Where there is a residual and the derivative takes one of two values, which of them it takes is
// the mask, uint8 of mask_bytes() elements (core/mask.h): backward takes it instead of the residual
// and needs no bias. It is of no elements where it is not wanted, and where x cannot have one.
ActForwardResults batch_norm_act_training(
    const Backend& backend, const at::Tensor& x, const OptionalTensor& residual,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
    std::optional<double> momentum, double eps, std::string_view activation, double parameter,
    bool want_mask);

ActForwardResults batch_norm_act_eval(const Backend& backend, const at::Tensor& x,
                                      const OptionalTensor& residual, const OptionalTensor& weight,
                                      const OptionalTensor& bias,
                                      const OptionalTensor& running_mean,
                                      const OptionalTensor& running_var, double eps, bool save,
                                      std::string_view activation, double parameter);

// The y of either forward again, bitwise, from what it was given and the statistics that it
// returned.
at::Tensor batch_norm_act_apply(const Backend& backend, const at::Tensor& x,
                                const OptionalTensor& residual, const OptionalTensor& weight,
                                const OptionalTensor& bias, const at::Tensor& mean,
                                const at::Tensor& invstd, bool training,
                                std::string_view activation, double parameter);

// dx, dresidual, dweight and dbias.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> batch_norm_act_backward(
    const Backend& backend, const at::Tensor& dy, const at::Tensor& x,
    const OptionalTensor& residual, const OptionalTensor& mask, const OptionalTensor& weight,
    const OptionalTensor& bias, const at::Tensor& mean, const at::Tensor& invstd, bool training,
    std::string_view activation, double parameter, bool want_dx, bool want_dresidual,
    bool want_dweight, bool want_dbias);

// The steps apart, for statistics that several processes share: each reduces its own batch to a row
// of float64, all get all rows (or, if they are `additive`, their sum), and go on. See struct
// PartialRows of problem.h for what rows hold.

// Reduces the statistics of x, which may be empty, to a row of shape (1 + 2C).
at::Tensor batch_norm_stats(const Backend& backend, const at::Tensor& x, bool additive);

// Two steps in one, so that a collective is followed by a single launch: combines rows of shape (R,
// 1 + 2C), finalizes the statistics and applies them; besides what batch_norm_training returns, the
// number of values of a channel, float64 of one element. Where that is less than 2 the running
// statistics stay as they are.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> batch_norm_combine_apply(
    const Backend& backend, const at::Tensor& x, const at::Tensor& rows, bool additive,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
    std::optional<double> momentum, double eps);

// Reduces the gradients to a row of shape (2C), and to those of weight and bias by this process's
// batch.
std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_backward_reduce(
    const Backend& backend, const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& weight,
    const at::Tensor& mean, const at::Tensor& invstd, bool want_dweight, bool want_dbias);

// Two steps in one, so that a collective is followed by a single launch: combines rows of shape (R,
// 2C) and applies them: dx. `count` is that of batch_norm_combine_apply.
at::Tensor batch_norm_backward_combine_apply(const Backend& backend, const at::Tensor& dy,
                                             const at::Tensor& x, const OptionalTensor& weight,
                                             const at::Tensor& mean, const at::Tensor& invstd,
                                             const at::Tensor& rows, const at::Tensor& count);

}  // namespace fastbn
