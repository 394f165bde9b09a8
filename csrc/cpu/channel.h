// SPDX-License-Identifier: BSD-3-Clause
//
// The arithmetic of a single channel, in double: merging statistics, updating the running ones, and
// the coefficients the elementwise loops need.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "loops.h"

namespace fastbn::cpu {

inline double read(const ChannelVector& vector, int64_t channel) {
  const char* element =
      static_cast<const char*>(vector.data) + channel * vector.stride * element_size(vector.dtype);
  if (vector.dtype == DType::kFloat64) return *reinterpret_cast<const double*>(element);
  if (vector.dtype == DType::kFloat32) return *reinterpret_cast<const float*>(element);
  float value;
  loops(vector.dtype).gather(element, 1, 1, &value);
  return value;
}

inline double read_or(const ChannelVector& vector, int64_t channel, double absent) {
  return vector.data == nullptr ? absent : read(vector, channel);
}

inline void write(const ChannelVector& vector, int64_t channel, double value) {
  char* element =
      static_cast<char*>(vector.data) + channel * vector.stride * element_size(vector.dtype);
  if (std::isnan(value)) value = std::numeric_limits<double>::quiet_NaN();  // see float_to_bfloat16
  const float rounded = static_cast<float>(value);
  if (vector.dtype == DType::kFloat64) {
    *reinterpret_cast<double*>(element) = value;
  } else if (vector.dtype == DType::kFloat32) {
    *reinterpret_cast<float*>(element) = rounded;
  } else {
    loops(vector.dtype).scatter(&rounded, element, 1, 1);
  }
}

// What is left of a value once it is held in the type the loops compute in.
inline double round_to(DType dtype, double value) {
  return dtype == DType::kFloat64 ? value : static_cast<double>(static_cast<float>(value));
}

// What two groups of values weigh when their moments are merged: Chan, Golub and LeVeque, "Updating
// formulae and a pairwise algorithm for computing sample variances", 1979.
struct ChanShares {
  ChanShares(double first, double second)
      : second_share(second / (first + second)), delta_weight(first * second_share) {}

  double second_share;
  double delta_weight;
};

inline void merge_moments(const ChanShares& shares, double other_mean, double other_m2,
                          double* mean, double* m2) {
  const double delta = other_mean - *mean;
  *mean += delta * shares.second_share;
  *m2 += other_m2 + delta * delta * shares.delta_weight;
}

// Number of values, their mean, and the sum of their squared deviations from it.
struct Moments {
  double count = 0;
  double mean = 0;
  double m2 = 0;

  void merge(const Moments& other) {
    merge_moments(ChanShares(count, other.count), other.mean, other.m2, &mean, &m2);
    count += other.count;
  }
};

// Sums over a channel of dy and of dy * (x - mean).
struct GradSums {
  double dy = 0;
  double dy_xmu = 0;

  void merge(const GradSums& other) {
    dy += other.dy;
    dy_xmu += other.dy_xmu;
  }
};

// Weight of the batch in the running statistics.
inline double blend_factor(const TrainingForward& op) {
  if (!op.cumulative) return op.momentum;
  return op.num_batches_tracked == nullptr ? 0.0
                                           : 1.0 / static_cast<double>(*op.num_batches_tracked);
}

// Saves the statistics of a channel, blends them into the running ones, and returns how to
// normalise. The part of the mean that its saved form cannot hold moves into the shift.
inline Affine finish_channel(const TrainingForward& op, int64_t channel, const Moments& moments,
                             double factor) {
  const double invstd = 1 / std::sqrt(moments.m2 / moments.count + op.eps);
  const double scale = invstd * read_or(op.weight, channel, 1);
  const double mean = round_to(op.problem.dtype, moments.mean);
  write(op.mean, channel, mean);
  write(op.invstd, channel, invstd);
  if (op.running_mean.data != nullptr) {
    const double unbiased = moments.m2 / (moments.count - 1);
    write(op.running_mean, channel,
          (1 - factor) * read(op.running_mean, channel) + factor * moments.mean);
    write(op.running_var, channel,
          (1 - factor) * read(op.running_var, channel) + factor * unbiased);
  }
  return {mean, scale, read_or(op.bias, channel, 0) - (moments.mean - mean) * scale};
}

inline Affine inference_channel(const InferenceForward& op, int64_t channel) {
  const double mean = read(op.running_mean, channel);
  const double invstd = 1 / std::sqrt(read(op.running_var, channel) + op.eps);
  if (op.mean.data != nullptr) {
    write(op.mean, channel, mean);
    write(op.invstd, channel, invstd);
  }
  return {mean, invstd * read_or(op.weight, channel, 1), read_or(op.bias, channel, 0)};
}

// How to compute dx = weight * invstd * dy, the gradient with given statistics.
inline Affine inference_gradient(const Backward& op, int64_t channel) {
  return {0, read(op.invstd, channel) * read_or(op.weight, channel, 1), 0};
}

// Writes the gradients of the parameters, where wanted, and returns how to compute dx in training:
// dx = weight * invstd * (dy - mean(dy) - x_hat * mean(dy * x_hat)), x_hat being
// (x - mean) * invstd (Ioffe and Szegedy, "Batch normalization", 2015, section 3).
inline GradAffine finish_gradient(const Backward& op, int64_t channel, const GradSums& sums) {
  const double mean = read(op.mean, channel);
  const double invstd = read(op.invstd, channel);
  const double scale = invstd * read_or(op.weight, channel, 1);
  if (op.dweight.data != nullptr) write(op.dweight, channel, sums.dy_xmu * invstd);
  if (op.dbias.data != nullptr) write(op.dbias, channel, sums.dy);
  const double count = static_cast<double>(op.problem.per_channel());
  return {mean, scale, -scale * invstd * invstd * sums.dy_xmu / count, -scale * sums.dy / count};
}

}  // namespace fastbn::cpu
