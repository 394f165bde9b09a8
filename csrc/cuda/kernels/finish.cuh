// SPDX-License-Identifier: BSD-3-Clause
//
// From what was gathered of a channel to results per channel and to the coefficients that the
// elementwise steps take.
#pragma once

#include "../device/values.cuh"

namespace fastbn::cuda {

// What is known of a channel: an array of each of these in shared memory.
template <typename acc_t, int kCount>
struct Coefficients {
  acc_t values[kCount];
};

// y = (x - mean) * scale + shift.
constexpr int kMean = 0;
constexpr int kScale = 1;
constexpr int kShift = 2;
template <typename acc_t>
using Affine = Coefficients<acc_t, 3>;
// Before that is known: a value that means are counted from, weight and bias.
constexpr int kReference = 0;
constexpr int kWeight = 1;
constexpr int kBias = 2;

// dx = scale * dy + (slope * (x - mean) + offset).
constexpr int kSlope = 2;
constexpr int kOffset = 3;
// Before these two are known.
constexpr int kInvstd = 2;
template <typename acc_t>
using GradAffine = Coefficients<acc_t, kCoefficients>;

// By one block of a launch.
FASTBN_DEVICE void count_batch(const TrainingForward& op) {
  if (op.num_batches_tracked == nullptr || gpu::thread_index() != 0) return;
  const int64_t batches = gpu::load_written(op.num_batches_tracked);
  gpu::store<gpu::Reuse::kLikely>(op.num_batches_tracked, batches + 1);
}

// What is needed besides the moments of a channel.
template <typename acc_t>
FASTBN_DEVICE Affine<acc_t> read_parameters(const TrainingForward& op, int64_t channel,
                                            acc_t reference) {
  return {{reference, static_cast<acc_t>(read_or(op.weight, channel, 1)),
           static_cast<acc_t>(read_or(op.bias, channel, 0))}};
}

// Of all elements of a channel.
template <typename acc_t>
struct Statistics {
  acc_t mean, invstd, unbiased_var;
  double exact_mean;  // few numbers, where digits matter

  // `moments` counts its mean from `reference`.
  FASTBN_DEVICE Statistics(const TrainingForward& op, const Moments<acc_t, 1>& moments,
                           acc_t reference) {
    const acc_t count = static_cast<acc_t>(op.problem.batch * op.problem.spatial);
    const acc_t var = moments.m2[0] / count;
    invstd = 1 / gpu::square_root(var + static_cast<acc_t>(op.eps));
    unbiased_var = moments.m2[0] / (count - 1);
    exact_mean = static_cast<double>(reference) + moments.mean[0];
    mean = static_cast<acc_t>(exact_mean);
  }

  // How to normalise, from what read_parameters() has read. The part of the mean that its saved
  // form cannot hold moves into the shift.
  FASTBN_DEVICE Affine<acc_t> affine(const Affine<acc_t>& parameters) const {
    const acc_t scale = invstd * parameters.values[kWeight];
    const acc_t residual = static_cast<acc_t>(exact_mean - mean);
    return {{mean, scale, parameters.values[kBias] - residual * scale}};
  }

  // Saves the statistics and blends them into the running ones: for one of the blocks that know
  // them.
  FASTBN_DEVICE void save(const TrainingForward& op, int64_t channel) const {
    write(op.mean, channel, mean);
    write(op.invstd, channel, invstd);
    if (op.running_mean.data == nullptr) return;
    double factor = op.momentum;
    if (op.cumulative) {
      // This batch is counted when all channels are finished.
      const int64_t* batches = op.num_batches_tracked;
      factor = batches == nullptr ? 0 : 1.0 / static_cast<double>(gpu::load_written(batches) + 1);
    }
    write(op.running_mean, channel,
          (1 - factor) * read(op.running_mean, channel) + factor * exact_mean);
    write(op.running_var, channel,
          (1 - factor) * read(op.running_var, channel) + factor * unbiased_var);
  }
};

// How to normalise by given statistics. `save` for one of the blocks that share the channel.
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
  return {{mean, invstd * static_cast<acc_t>(read_or(op.weight, channel, 1)), invstd, 0}};
}

// How dx follows in training, from given_gradient() and the sums of all elements of the channel:
// dx = weight * invstd * (dy - mean(dy) - x_hat * mean(dy * x_hat)), x_hat being
// (x - mean) * invstd (Ioffe and Szegedy, "Batch normalization", 2015, section 3).
template <typename acc_t>
FASTBN_DEVICE GradAffine<acc_t> training_gradient(const Backward& op,
                                                  const GradAffine<acc_t>& given,
                                                  const GradSums<acc_t, 1>& sums) {
  const acc_t count = static_cast<acc_t>(op.problem.batch * op.problem.spatial);
  const acc_t scale = given.values[kScale];
  const acc_t invstd = given.values[kInvstd];
  return {{given.values[kMean], scale, -scale * invstd * invstd * (sums.dy_xmu[0] / count),
           -scale * (sums.dy[0] / count)}};
}

// Writes the gradients of the parameters, where wanted: for one of the blocks that know the sums.
template <typename acc_t>
FASTBN_DEVICE void save_gradients(const Backward& op, int64_t channel, acc_t invstd,
                                  const GradSums<acc_t, 1>& sums) {
  if (op.dweight.data != nullptr) write(op.dweight, channel, sums.dy_xmu[0] * invstd);
  if (op.dbias.data != nullptr) write(op.dbias, channel, sums.dy[0]);
}

}  // namespace fastbn::cuda
