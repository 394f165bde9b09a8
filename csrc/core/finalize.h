// SPDX-License-Identifier: BSD-3-Clause
//
// The formulas between a reduction and what is applied to elements, each for a single channel: mean
// and invstd, the running statistics, and the coefficients, which make up for the rounding of the
// mean. T is double on the host and acc_t on a GPU.
#pragma once

#include <cmath>
#include <cstdint>

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

// Backward through an epilogue: the same for the gradient of the pre-activation, which is
// (x - mean) * scale + shift, plus a residual.
template <typename T>
struct ActivatedGradAffine {
  GradAffine<T> gradient;
  T shift;
};

// Room for the numbers of either of the first two.
constexpr int kCoefficients = sizeof(GradAffine<float>) / sizeof(float);
static_assert(sizeof(Affine<float>) <= sizeof(GradAffine<float>));

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

// Values that the moments of a channel are taken to be of: those of no values are those of one
// zero.
FASTBN_HOST_DEVICE double count_or_one(double count) { return count > 0 ? count : 1; }

// Whether a batch of so many values of a channel has an unbiased variance to record. One process
// has no smaller batch, but all processes together may.
FASTBN_HOST_DEVICE bool has_unbiased_var(double count) { return count > 1; }

// The weight of a batch in the running statistics; `batches` counts it, and is 0 where nobody
// counts.
FASTBN_HOST_DEVICE double blend_factor(bool cumulative, double momentum, int64_t batches) {
  if (!cumulative) return momentum;
  return batches == 0 ? 0.0 : 1.0 / static_cast<double>(batches);
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
