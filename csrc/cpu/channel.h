// SPDX-License-Identifier: BSD-3-Clause
//
// The steps of a single channel, in double: reading and writing its values, and finalizing what was
// reduced.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "../core/finalize.h"
#include "../core/moments.h"
#include "../core/partial_rows.h"
#include "../core/problem.h"
#include "simd/loops.h"

namespace fastbn::cpu {

// Out of line, so that whoever loops over channels of the usual dtypes keeps numbers in registers.
__attribute__((noinline, cold)) inline float read_16_bits(DType dtype, const char* element) {
  float value;
  loops(dtype).pack(element, 1, 1, &value);
  return value;
}
__attribute__((noinline, cold)) inline void write_16_bits(DType dtype, char* element, float value) {
  loops(dtype).unpack(&value, element, 1, 1);
}

inline double read(const InputVector& vector, int64_t channel) {
  const char* element =
      static_cast<const char*>(vector.data) + channel * vector.stride * element_size(vector.dtype);
  if (vector.dtype == DType::kFloat64) return *reinterpret_cast<const double*>(element);
  if (vector.dtype == DType::kFloat32) return *reinterpret_cast<const float*>(element);
  return read_16_bits(vector.dtype, element);
}

inline double read_or(const InputVector& vector, int64_t channel, double absent) {
  return vector.data == nullptr ? absent : read(vector, channel);
}

inline void write(const OutputVector& vector, int64_t channel, double value) {
  char* element =
      static_cast<char*>(vector.data) + channel * vector.stride * element_size(vector.dtype);
  if (std::isnan(value)) value = std::numeric_limits<double>::quiet_NaN();  // see float_to_bfloat16
  const float rounded = static_cast<float>(value);
  if (vector.dtype == DType::kFloat64) {
    *reinterpret_cast<double*>(element) = value;
  } else if (vector.dtype == DType::kFloat32) {
    *reinterpret_cast<float*>(element) = rounded;
  } else {
    write_16_bits(vector.dtype, element, rounded);
  }
}

// A value as it is held in the dtype of sums.
inline double round_to_sums(DType dtype, double value) {
  return accumulate_dtype(dtype) == DType::kFloat64
             ? value
             : static_cast<double>(static_cast<float>(value));
}

// Weight of the batch in the running statistics; a batch is counted before.
inline double blend_factor(const RunningStatistics& running) {
  const int64_t* batches = running.num_batches_tracked;
  return fastbn::blend_factor(running.cumulative, running.momentum,
                              batches == nullptr ? 0 : *batches);
}

inline void update_running(const RunningStatistics& running, int64_t channel, double factor,
                           const Statistics<double>& statistics) {
  if (running.mean.data == nullptr) return;
  write(running.mean, channel, blend(read(running.mean, channel), statistics.exact_mean, factor));
  write(running.var, channel, blend(read(running.var, channel), statistics.unbiased_var, factor));
}

// Finalizes a channel of `count` values: saves its statistics, blends them into the running ones,
// and returns how to normalize.
inline Affine<double> finalize_channel(const TrainingForward& op, int64_t channel,
                                       const Moments<double>& moments, double count,
                                       double factor) {
  const Statistics<double> statistics(moments.mean[0], moments.m2[0], count, op.eps);
  const double mean = round_to_sums(op.problem.dtype, statistics.exact_mean);
  write(op.mean, channel, statistics.exact_mean);
  write(op.invstd, channel, statistics.invstd);
  if (has_unbiased_var(count)) update_running(op.running, channel, factor, statistics);
  return affine_of(statistics.exact_mean, mean, statistics.invstd, read_or(op.weight, channel, 1),
                   read_or(op.bias, channel, 0));
}

// Combines the rows of partial results and finalizes.
inline Affine<double> combine_channel(const TrainingForward& op, int64_t channel, double factor) {
  const Moments<double> moments = combine_moments(op.partials, op.problem.channels, channel,
                                                  [&](int64_t i) { return op.partials.in[i]; });
  if (channel == 0) *op.total_count = moments.count;
  return finalize_channel(op, channel, moments, count_or_one(moments.count), factor);
}

// Leaves the moments of a channel in the row of partial results.
inline void leave_moments(const TrainingForward& op, int64_t channel, const Moments<double>& all) {
  write_moments(op.partials, op.problem.channels, channel, all,
                [&](int64_t i, double number) { op.partials.out[i] = number; });
}

// The coefficients that forward in training had, by the statistics that it saved in float64.
template <typename Op>
Affine<double> saved_affine(const Op& op, const InputVector& saved_mean,
                            const InputVector& saved_invstd, int64_t channel) {
  const double mean = read(saved_mean, channel);
  return affine_of(mean, round_to_sums(op.problem.dtype, mean), read(saved_invstd, channel),
                   read_or(op.weight, channel, 1), read_or(op.bias, channel, 0));
}

inline Affine<double> eval_channel(const EvalForward& op, int64_t channel) {
  if (op.saved.mean.data != nullptr) {
    Affine<double> affine = saved_affine(op, op.saved.mean, op.saved.invstd, channel);
    if (!op.saved.training) affine.shift = read_or(op.bias, channel, 0);
    return affine;
  }
  const double mean = read(op.running_mean, channel);
  const double invstd = invstd_of(read(op.running_var, channel), op.eps);
  if (op.mean.data != nullptr) {
    write(op.mean, channel, mean);
    write(op.invstd, channel, invstd);
  }
  return {mean, invstd * read_or(op.weight, channel, 1), read_or(op.bias, channel, 0)};
}

// The coefficients of dx = weight * invstd * dy, the gradient with given statistics.
inline Affine<double> eval_gradient(const Backward& op, int64_t channel) {
  return {0, read(op.invstd, channel) * read_or(op.weight, channel, 1), 0};
}

// The coefficients of the pre-activation, those that forward had.
inline Affine<double> pre_activation(const Backward& op, int64_t channel) {
  return saved_affine(op, op.mean, op.invstd, channel);
}

// Writes the gradients of the parameters, where wanted.
inline void save_parameter_gradients(const Backward& op, int64_t channel,
                                     const GradSums<double>& sums) {
  if (op.dweight.data != nullptr) {
    write(op.dweight, channel, sums.dy_xmu[0] * read(op.invstd, channel));
  }
  if (op.dbias.data != nullptr) write(op.dbias, channel, sums.dy[0]);
}

// The coefficients of dx in training, over `count` values.
inline GradAffine<double> finalize_gradient(const Backward& op, int64_t channel,
                                            const GradSums<double>& sums, double count) {
  const double invstd = read(op.invstd, channel);
  const double scale = invstd * read_or(op.weight, channel, 1);
  return grad_affine_of(read(op.mean, channel), invstd, scale, sums, count);
}

// The coefficients of dx with given statistics, where an epilogue follows.
inline ActivatedGradAffine<double> eval_activated_gradient(const Backward& op, int64_t channel) {
  const Affine<double> z = pre_activation(op, channel);
  return {{z.mean, z.scale, 0, 0}, z.shift};
}

// The coefficients of dx in training with or without an epilogue.
inline ActivatedGradAffine<double> finalize_activated_gradient(const Backward& op, int64_t channel,
                                                               const GradSums<double>& sums,
                                                               double count) {
  const GradAffine<double> gradient = finalize_gradient(op, channel, sums, count);
  return {gradient, op.epilogue.is_empty() ? 0 : pre_activation(op, channel).shift};
}

inline GradAffine<double> combine_gradient(const Backward& op, int64_t channel) {
  const GradSums<double> sums = combine_grad_sums(op.partials, op.problem.channels, channel,
                                                  [&](int64_t i) { return op.partials.in[i]; });
  return finalize_gradient(op, channel, sums, *op.total_count);
}

inline void leave_grad_sums(const Backward& op, int64_t channel, const GradSums<double>& all) {
  write_grad_sums(op.problem.channels, channel, all,
                  [&](int64_t i, double number) { op.partials.out[i] = number; });
}

}  // namespace fastbn::cpu
