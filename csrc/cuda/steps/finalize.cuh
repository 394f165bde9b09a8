// SPDX-License-Identifier: BSD-3-Clause
//
// From what was reduced of a channel to results per channel and to the coefficients that are
// applied, by the formulas of core/finalize.h; and what passes through rows of partial results
// instead.
//
// What is known of a channel lies in shared memory as a record, before it is finalized as
// ForwardInputs or GradInputs, after that and in the same place as Affine or GradAffine.
#pragma once

#include "../../core/finalize.h"
#include "../../core/partial_rows.h"
#include "../primitives/channel_values.cuh"

namespace fastbn::cuda {

// --- Forward -------------------------------------------------------------------------------------

// Before statistics are finalized: the value that means are counted from, and the parameters.
template <typename acc_t>
struct ForwardInputs {
  acc_t pivot, weight, bias;
};

// Counts the batch, unless it was counted before; one block of a launch calls it.
FASTBN_DEVICE void count_batch(const RunningStatistics& running) {
  if (running.num_batches_tracked == nullptr || running.counted || gpu::thread_index() != 0) return;
  const int64_t batches = gpu::load_coherent(running.num_batches_tracked);
  gpu::store<gpu::CacheHint::kKeep>(running.num_batches_tracked, batches + 1);
}

// Weight of the batch in the running statistics, which was counted before or will be after all
// channels are finalized: plans for one launch, in which blocks count while others finalize, are
// not for averages over all batches.
FASTBN_DEVICE double blend_factor(const RunningStatistics& running) {
  int64_t batches = 0;
  if (running.cumulative && running.num_batches_tracked != nullptr) {
    batches = gpu::load_coherent(running.num_batches_tracked) + !running.counted;
  }
  return fastbn::blend_factor(running.cumulative, running.momentum, batches);
}

template <typename acc_t>
FASTBN_DEVICE ForwardInputs<acc_t> forward_inputs(const TrainingForward& op, int64_t channel,
                                                  acc_t pivot) {
  return {pivot, static_cast<acc_t>(read_or(op.weight, channel, 1)),
          static_cast<acc_t>(read_or(op.bias, channel, 0))};
}

// The statistics of a channel, of `count` values.
template <typename acc_t>
class FinalStatistics {
 public:
  FASTBN_DEVICE FinalStatistics(const TrainingForward& op, double mean, acc_t m2, double count)
      : op_(op),
        statistics_(mean, m2, static_cast<acc_t>(count), static_cast<acc_t>(op.eps)),
        mean_(static_cast<acc_t>(mean)),
        count_(count) {}

  // The statistics of a channel all of whose values this process has.
  FASTBN_DEVICE FinalStatistics(const TrainingForward& op, const PivotedMoments<acc_t>& all)
      : FinalStatistics(op, static_cast<double>(all.pivot) + all.moments.mean[0], all.moments.m2[0],
                        op.count) {}

  // The coefficients that normalize by these statistics.
  FASTBN_DEVICE Affine<acc_t> affine(const ForwardInputs<acc_t>& inputs) const {
    return affine_of(statistics_.exact_mean, mean_, statistics_.invstd, inputs.weight, inputs.bias);
  }

  // Saves the statistics for backward, and blends them into the running ones: one of the blocks
  // that know them calls these.
  FASTBN_DEVICE void save(int64_t channel) const {
    write(op_.mean, channel, statistics_.exact_mean);  // rounded, unless it is saved in float64
    write(op_.invstd, channel, statistics_.invstd);
  }
  FASTBN_DEVICE void update_running(int64_t channel) const {
    const RunningStatistics& running = op_.running;
    if (running.mean.data == nullptr || !has_unbiased_var(count_)) return;
    const double factor = blend_factor(running);
    write(running.mean, channel,
          blend(read(running.mean, channel), statistics_.exact_mean, factor));
    write(running.var, channel,
          blend(read(running.var, channel), statistics_.unbiased_var, factor));
  }

 private:
  const TrainingForward& op_;
  Statistics<acc_t> statistics_;
  acc_t mean_;
  double count_;
};

// Leaves the moments of a channel in the row of partial results.
template <typename acc_t>
FASTBN_DEVICE void leave_moments(const TrainingForward& op, int64_t channel,
                                 const PivotedMoments<acc_t>& all) {
  const Moments<double> moments{
      op.count, {static_cast<double>(all.pivot) + all.moments.mean[0]}, {all.moments.m2[0]}};
  write_moments(op.partials, op.problem.channels, channel, moments, [&](int64_t i, double number) {
    gpu::store<gpu::CacheHint::kKeep>(op.partials.out + i, number);
  });
}

// Combines the rows of partial results and finalizes: how to normalize. `save` for one of the
// blocks that share the channel.
template <typename acc_t>
FASTBN_DEVICE Affine<acc_t> combine_forward(const TrainingForward& op, int64_t channel, bool save) {
  const Moments<double> all =
      combine_moments(op.partials, op.problem.channels, channel,
                      [&](int64_t i) { return gpu::load_coherent(op.partials.in + i); });
  const double count = count_or_one(all.count);
  const FinalStatistics<acc_t> statistics(op, all.mean[0], static_cast<acc_t>(all.m2[0]), count);
  if (save) {
    statistics.save(channel);
    statistics.update_running(channel);
    if (channel == 0) gpu::store<gpu::CacheHint::kKeep>(op.total_count, all.count);
  }
  return statistics.affine(forward_inputs<acc_t>(op, channel, 0));
}

// The coefficients that forward in training had, by the statistics that it saved in float64:
// bitwise the same, as these are exact.
template <typename acc_t, typename Op>
FASTBN_DEVICE Affine<acc_t> saved_affine(const Op& op, const InputVector& saved_mean,
                                         const InputVector& saved_invstd, int64_t channel) {
  const double exact_mean = read(saved_mean, channel);
  return affine_of(exact_mean, static_cast<acc_t>(exact_mean),
                   static_cast<acc_t>(read(saved_invstd, channel)),
                   static_cast<acc_t>(read_or(op.weight, channel, 1)),
                   static_cast<acc_t>(read_or(op.bias, channel, 0)));
}

// The coefficients that normalize by given statistics. Of the blocks that share the channel one
// passes `save`.
template <typename acc_t>
FASTBN_DEVICE Affine<acc_t> eval_affine(const EvalForward& op, int64_t channel, bool save) {
  if (op.saved.mean.data != nullptr) {
    Affine<acc_t> affine = saved_affine<acc_t>(op, op.saved.mean, op.saved.invstd, channel);
    if (!op.saved.training) affine.shift = static_cast<acc_t>(read_or(op.bias, channel, 0));
    return affine;
  }
  const acc_t mean = static_cast<acc_t>(read(op.running_mean, channel));
  const acc_t var = static_cast<acc_t>(read(op.running_var, channel));
  const acc_t invstd = invstd_of(var, static_cast<acc_t>(op.eps));
  if (save && op.mean.data != nullptr) {
    write(op.mean, channel, mean);
    write(op.invstd, channel, invstd);
  }
  return {mean, invstd * static_cast<acc_t>(read_or(op.weight, channel, 1)),
          static_cast<acc_t>(read_or(op.bias, channel, 0))};
}

// --- Backward ------------------------------------------------------------------------------------

// Before gradients are finalized: what forward saved, and invstd * weight. The mean and scale stay
// where GradAffine has them.
template <typename acc_t>
struct GradInputs {
  acc_t mean, scale, invstd;
};

template <typename acc_t>
FASTBN_DEVICE GradInputs<acc_t> grad_inputs(const Backward& op, int64_t channel) {
  const acc_t mean = static_cast<acc_t>(read(op.mean, channel));
  const acc_t invstd = static_cast<acc_t>(read(op.invstd, channel));
  return {mean, invstd * static_cast<acc_t>(read_or(op.weight, channel, 1)), invstd};
}

// The shift of forward, of which backward knows the mean and scale.
template <typename acc_t>
FASTBN_DEVICE acc_t shift_of(const Backward& op, int64_t channel) {
  return saved_affine<acc_t>(op, op.mean, op.invstd, channel).shift;
}

// The coefficients of dx in training, from the sums over `count` values.
template <typename acc_t>
FASTBN_DEVICE GradAffine<acc_t> finalize_gradient(const GradInputs<acc_t>& inputs,
                                                  const GradSums<acc_t>& sums, double count) {
  return grad_affine_of(inputs.mean, inputs.invstd, inputs.scale, sums, static_cast<acc_t>(count));
}

// Writes the gradients of the parameters, where wanted: for one of the blocks that know the sums.
template <typename acc_t>
FASTBN_DEVICE void save_parameter_gradients(const Backward& op, int64_t channel, acc_t invstd,
                                            const GradSums<acc_t>& sums) {
  if (op.dweight.data != nullptr) write(op.dweight, channel, sums.dy_xmu[0] * invstd);
  if (op.dbias.data != nullptr) write(op.dbias, channel, sums.dy[0]);
}

// Leaves the sums of a channel in the row of partial results.
template <typename acc_t>
FASTBN_DEVICE void leave_grad_sums(const Backward& op, int64_t channel,
                                   const GradSums<acc_t>& sums) {
  const GradSums<double> wide{{sums.dy[0]}, {sums.dy_xmu[0]}};
  write_grad_sums(op.problem.channels, channel, wide, [&](int64_t i, double number) {
    gpu::store<gpu::CacheHint::kKeep>(op.partials.out + i, number);
  });
}

// Combines the rows of partial results into the coefficients of dx.
template <typename acc_t>
FASTBN_DEVICE GradAffine<acc_t> combine_backward(const Backward& op, int64_t channel) {
  const GradSums<double> all =
      combine_grad_sums(op.partials, op.problem.channels, channel,
                        [&](int64_t i) { return gpu::load_coherent(op.partials.in + i); });
  const GradSums<acc_t> sums{{static_cast<acc_t>(all.dy[0])}, {static_cast<acc_t>(all.dy_xmu[0])}};
  return finalize_gradient(grad_inputs<acc_t>(op, channel), sums,
                           gpu::load_coherent(op.total_count));
}

}  // namespace fastbn::cuda
