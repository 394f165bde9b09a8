// SPDX-License-Identifier: BSD-3-Clause
//
// From what was gathered of a channel to results per channel and to the coefficients that the
// elementwise steps take.
#pragma once

#include "../device/values.cuh"

namespace fastbn::cuda {

// What an elementwise step knows of a channel: kMean, kScale, ...
template <typename acc_t, int kCount>
struct Coefficients {
  acc_t values[kCount];
};

constexpr int kMean = 0;
constexpr int kScale = 1;
// y = (x - mean) * scale + shift.
constexpr int kShift = 2;
template <typename acc_t>
using Affine = Coefficients<acc_t, 3>;
// dx = scale * dy + (slope * (x - mean) + offset).
constexpr int kSlope = 2;
constexpr int kOffset = 3;
template <typename acc_t>
using GradAffine = Coefficients<acc_t, kCoefficients>;

// By one block of a launch.
FASTBN_DEVICE void count_batch(const TrainingForward& op) {
  if (op.num_batches_tracked == nullptr || gpu::thread_index() != 0) return;
  const int64_t batches = gpu::load_written(op.num_batches_tracked);
  gpu::store<gpu::Reuse::kLikely>(op.num_batches_tracked, batches + 1);
}

// Saves the statistics of a channel, blends them into the running ones, and returns how to
// normalise. `moments` counts its mean from `reference`. The part of the mean that its saved form
// cannot hold moves into the shift. Few numbers, where digits matter: in float64.
template <typename acc_t>
FASTBN_DEVICE Affine<acc_t> finish_statistics(const TrainingForward& op, int64_t channel,
                                              const Moments<acc_t, 1>& moments, acc_t reference) {
  const acc_t count = static_cast<acc_t>(op.problem.batch * op.problem.spatial);
  const acc_t var = moments.m2[0] / count;
  const acc_t invstd = 1 / gpu::square_root(var + static_cast<acc_t>(op.eps));
  const acc_t scale = invstd * static_cast<acc_t>(read_or(op.weight, channel, 1));
  const double exact_mean = static_cast<double>(reference) + moments.mean[0];
  const acc_t mean = static_cast<acc_t>(exact_mean);
  write(op.mean, channel, mean);
  write(op.invstd, channel, invstd);
  if (op.running_mean.data != nullptr) {
    double factor = op.momentum;
    if (op.cumulative) {
      // This batch is counted when all channels are finished.
      const int64_t* batches = op.num_batches_tracked;
      factor = batches == nullptr ? 0 : 1.0 / static_cast<double>(gpu::load_written(batches) + 1);
    }
    const double unbiased = moments.m2[0] / (count - 1);
    write(op.running_mean, channel,
          (1 - factor) * read(op.running_mean, channel) + factor * exact_mean);
    write(op.running_var, channel,
          (1 - factor) * read(op.running_var, channel) + factor * unbiased);
  }
  const acc_t residual = static_cast<acc_t>(exact_mean - mean);
  return {{mean, scale, static_cast<acc_t>(read_or(op.bias, channel, 0)) - residual * scale}};
}

// The same with given statistics. `save` for one of the blocks that share the channel.
template <typename acc_t>
FASTBN_DEVICE Affine<acc_t> given_statistics(const InferenceForward& op, int64_t channel,
                                             bool save) {
  const acc_t mean = static_cast<acc_t>(read(op.running_mean, channel));
  const acc_t var = static_cast<acc_t>(read(op.running_var, channel));
  const acc_t invstd = 1 / gpu::square_root(var + static_cast<acc_t>(op.eps));
  if (save && op.mean.data != nullptr) {
    write(op.mean, channel, mean);
    write(op.invstd, channel, invstd);
  }
  return {{mean, invstd * static_cast<acc_t>(read_or(op.weight, channel, 1)),
           static_cast<acc_t>(read_or(op.bias, channel, 0))}};
}

// How dx follows from dy and the statistics alone.
template <typename acc_t>
FASTBN_DEVICE GradAffine<acc_t> given_gradient(const Backward& op, int64_t channel) {
  const acc_t mean = static_cast<acc_t>(read(op.mean, channel));
  const acc_t invstd = static_cast<acc_t>(read(op.invstd, channel));
  return {{mean, invstd * static_cast<acc_t>(read_or(op.weight, channel, 1)), 0, 0}};
}

// Writes the gradients of the parameters, where wanted, and returns how to compute dx in training:
// dx = weight * invstd * (dy - mean(dy) - x_hat * mean(dy * x_hat)), x_hat being
// (x - mean) * invstd (Ioffe and Szegedy, "Batch normalization", 2015, section 3).
template <typename acc_t>
FASTBN_DEVICE GradAffine<acc_t> finish_gradient(const Backward& op, int64_t channel,
                                                const GradSums<acc_t, 1>& sums) {
  const acc_t invstd = static_cast<acc_t>(read(op.invstd, channel));
  const acc_t count = static_cast<acc_t>(op.problem.batch * op.problem.spatial);
  GradAffine<acc_t> affine = given_gradient<acc_t>(op, channel);
  const acc_t scale = affine.values[kScale];
  affine.values[kSlope] = -scale * invstd * invstd * (sums.dy_xmu[0] / count);
  affine.values[kOffset] = -scale * (sums.dy[0] / count);
  if (op.dweight.data != nullptr) write(op.dweight, channel, sums.dy_xmu[0] * invstd);
  if (op.dbias.data != nullptr) write(op.dbias, channel, sums.dy[0]);
  return affine;
}

}  // namespace fastbn::cuda
