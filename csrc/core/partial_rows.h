// SPDX-License-Identifier: BSD-3-Clause
//
// The rows of partial results that processes exchange (struct PartialRows of problem.h), a channel
// at a time and in the order of rows, so that all processes get the same bits. `load(i)` reads and
// `store(i, number)` writes the i-th number of all rows.
#pragma once

#include "host_device.h"
#include "moments.h"
#include "problem.h"

namespace fastbn {

// Numbers in a row of forward, which has the count in front, and in one of backward.
FASTBN_HOST_DEVICE constexpr int64_t moments_row_length(int64_t channels) {
  return 1 + 2 * channels;
}
FASTBN_HOST_DEVICE constexpr int64_t grad_sums_row_length(int64_t channels) { return 2 * channels; }

// Writes the moments of a channel to the only row; channel 0 brings the count with it.
template <typename Store>
FASTBN_HOST_DEVICE void write_moments(const PartialRows& to, int64_t channels, int64_t channel,
                                      const Moments<double>& moments, const Store& store) {
  const double sum = moments.count * moments.mean[0];
  if (channel == 0) store(0, moments.count);
  store(1 + channel, to.additive ? sum : moments.mean[0]);
  store(1 + channels + channel,
        to.additive ? moments.m2[0] + sum * moments.mean[0] : moments.m2[0]);
}

// The moments of a channel in all rows together; rows of no values do not matter.
template <typename Load>
FASTBN_HOST_DEVICE Moments<double> combine_moments(const PartialRows& from, int64_t channels,
                                                   int64_t channel, const Load& load) {
  Moments<double> all;
  // Divisions of more rows at once take more registers than some GPUs' kernels have.
  FASTBN_UNROLL_TWICE
  for (int64_t row = 0; row < from.rows; ++row) {
    const int64_t first = row * moments_row_length(channels);
    const Moments<double> moments{
        load(first), {load(first + 1 + channel)}, {load(first + 1 + channels + channel)}};
    if (!from.additive) {
      all.merge(moments);
    } else if (moments.count != 0) {
      all.count += moments.count;
      all.mean[0] += moments.mean[0];
      all.m2[0] += moments.m2[0];
    }
  }
  if (from.additive && all.count != 0) {
    const double sum = all.mean[0];
    all.mean[0] = sum / all.count;
    const double m2 = all.m2[0] - sum * all.mean[0];
    all.m2[0] = m2 < 0 ? 0 : m2;  // keeps NaN
  }
  return all;
}

template <typename Store>
FASTBN_HOST_DEVICE void write_grad_sums(int64_t channels, int64_t channel,
                                        const GradSums<double>& sums, const Store& store) {
  store(channel, sums.dy[0]);
  store(channels + channel, sums.dy_xmu[0]);
}

template <typename Load>
FASTBN_HOST_DEVICE GradSums<double> combine_grad_sums(const PartialRows& from, int64_t channels,
                                                      int64_t channel, const Load& load) {
  GradSums<double> all;
  for (int64_t row = 0; row < from.rows; ++row) {
    const int64_t first = row * grad_sums_row_length(channels);
    all.merge({{load(first + channel)}, {load(first + channels + channel)}});
  }
  return all;
}

}  // namespace fastbn
