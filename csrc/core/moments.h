// SPDX-License-Identifier: BSD-3-Clause
//
// What batch norm reduces a channel to, and how two results of a reduction are merged: on the host
// in double, on a GPU in acc_t. No merge depends on anything but its operands, so that results are
// bitwise the same whenever parts are merged in the same order.
#pragma once

#include "host_device.h"

namespace fastbn {

// The weight of the second of two groups of values when their moments are merged.
template <typename T>
struct MergeWeights {
  T share;        // of the second group in all values
  T between_sum;  // factor of the squared distance of the means in the sum of squared deviations
};

template <typename T>
FASTBN_HOST_DEVICE MergeWeights<T> merge_weights(T first_count, T second_count) {
  const T share = second_count / (first_count + second_count);
  return {share, first_count * share};
}

// Merges the second group's moments into the first's: Chan, Golub and LeVeque, "Updating formulae
// and a pairwise algorithm for computing sample variances", 1979.
template <typename T>
FASTBN_HOST_DEVICE void merge_moments(const MergeWeights<T>& weights, T second_mean, T second_m2,
                                      T& mean, T& m2) {
  const T delta = second_mean - mean;
  mean += delta * weights.share;
  m2 += second_m2 + delta * delta * weights.between_sum;
}

// Number of values, and for each of `kLanes` channels their mean and the sum of their squared
// deviations from it.
template <typename acc_t, int kLanes = 1>
struct Moments {
  using Lane = Moments<acc_t, 1>;

  acc_t count = 0;
  acc_t mean[kLanes] = {};
  acc_t m2[kLanes] = {};

  FASTBN_HOST_DEVICE void merge(const Moments& other) {
    if (other.count == 0) return;
    const MergeWeights<acc_t> weights = merge_weights(count, other.count);
    FASTBN_UNROLL
    for (int lane = 0; lane < kLanes; ++lane) {
      merge_moments(weights, other.mean[lane], other.m2[lane], mean[lane], m2[lane]);
    }
    count += other.count;
  }

  FASTBN_HOST_DEVICE Lane lane(int index) const { return {count, {mean[index]}, {m2[index]}}; }
};

// For each of `kLanes` channels the sums of dy and of dy * (x - mean).
template <typename acc_t, int kLanes = 1>
struct GradSums {
  using Lane = GradSums<acc_t, 1>;

  acc_t dy[kLanes] = {};
  acc_t dy_xmu[kLanes] = {};

  FASTBN_HOST_DEVICE void merge(const GradSums& other) {
    FASTBN_UNROLL
    for (int lane = 0; lane < kLanes; ++lane) {
      dy[lane] += other.dy[lane];
      dy_xmu[lane] += other.dy_xmu[lane];
    }
  }

  FASTBN_HOST_DEVICE Lane lane(int index) const { return {{dy[index]}, {dy_xmu[index]}}; }
};

}  // namespace fastbn
