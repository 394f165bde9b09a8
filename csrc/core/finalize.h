// SPDX-License-Identifier: BSD-3-Clause
//
// The formulas between a reduction and what is applied to elements, each for a single channel:
// mean and invstd, their rounding, the running statistics, and the coefficients. T is double on the
// host and acc_t on a GPU.
#pragma once

#include <cmath>

#include "host_device.h"
#include "moments.h"

namespace fastbn {

// Forward: y = (x - mean) * scale + shift.
template <typename T>
struct Affine {
  T mean, scale, shift;
};

// Backward: dx = dy * scale + (x - mean) * slope + offset.
template <typename T>
struct GradAffine {
  T mean, scale, slope, offset;
};

template <typename T>
FASTBN_HOST_DEVICE T invstd_of(T var, T eps) {
  using std::sqrt;
  return 1 / sqrt(var + eps);
}

// Mean and variance of all values of a channel. Their number is an argument: `moments` may have
// been taken where it is held less exactly.
template <typename T>
struct Statistics {
  double exact_mean;
  T invstd;
  T unbiased_var;

  FASTBN_HOST_DEVICE Statistics(double mean, T m2, T count, T eps)
      : exact_mean(mean), invstd(invstd_of(m2 / count, eps)), unbiased_var(m2 / (count - 1)) {}
};

// The coefficients that normalize by a mean that is held as `mean` and is `exact_mean`: what its
// held form lacks moves into the shift.
template <typename T>
FASTBN_HOST_DEVICE Affine<T> affine_of(double exact_mean, T mean, T invstd, T weight, T bias) {
  const T scale = invstd * weight;
  const T residual = static_cast<T>(exact_mean - mean);
  return {mean, scale, bias - residual * scale};
}

// A running statistic after a batch that weighs `factor`.
FASTBN_HOST_DEVICE double blend(double running, double batch, double factor) {
  return (1 - factor) * running + factor * batch;
}

// dx in training, where the statistics are functions of x:
// dx = weight * invstd * (dy - mean(dy) - x_hat * mean(dy * x_hat)), x_hat being
// (x - mean) * invstd (Ioffe and Szegedy, "Batch normalization", 2015, section 3).
template <typename T>
FASTBN_HOST_DEVICE GradAffine<T> grad_affine_of(T mean, T invstd, T scale, const GradSums<T>& sums,
                                                T count) {
  return {mean, scale, -scale * invstd * invstd * sums.dy_xmu[0] / count,
          -scale * sums.dy[0] / count};
}

}  // namespace fastbn
