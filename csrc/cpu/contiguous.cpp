// SPDX-License-Identifier: BSD-3-Clause
//
// Contiguous (NCS) activations, a row of a channel at a time; and those of any strides.
//
// Contiguous, per element: training forward reads x once from memory and once from cache where a
// channel fits there, and writes y; backward reads x and dy likewise and writes dx.
#include "batch_norm.h"
#include "nontemporal.h"
#include "reduce_apply.h"
#include "strided_access.h"

namespace fastbn::cpu::contiguous {

namespace {

// Applies y = (x - mean) * scale + shift to the blocks it is called with.
class ApplyForward {
 public:
  ApplyForward(const Problem& problem, const InputActivation& x, const OutputActivation& y)
      : problem_(problem), x_(problem, x), y_(problem, y), stream_(streams(problem)) {}

  void operator()(const ChannelGroup& group, const ChannelBlock& whole,
                  const Coefficients& values) const {
    for_each_group_block(problem_, group, whole, [&](const ChannelBlock& block, int64_t step) {
      Scratch in, out;
      loops_of(problem_).normalize(x_.read(group.first, block, in),
                                   y_.target(group.first, block, out), rows_of(problem_, block),
                                   values.affine(group.column), step, stream_);
      y_.commit(group.first, block, out);
    });
  }

 private:
  const Problem& problem_;
  Operand<const void> x_;
  Operand<void> y_;
  bool stream_;
};

// Applies dx = dy * scale + (x - mean) * slope + offset.
class ApplyBackward {
 public:
  explicit ApplyBackward(const Backward& op)
      : problem_(op.problem),
        dy_(op.problem, op.dy),
        x_(op.problem, op.x),
        dx_(op.problem, op.dx),
        stream_(streams(op.problem)) {}

  void operator()(const ChannelGroup& group, const ChannelBlock& whole,
                  const Coefficients& values) const {
    for_each_group_block(problem_, group, whole, [&](const ChannelBlock& block, int64_t step) {
      Scratch dy, x, dx;
      loops_of(problem_).grad_input(dy_.read(group.first, block, dy),
                                    x_.read(group.first, block, x),
                                    dx_.target(group.first, block, dx), rows_of(problem_, block),
                                    values.grad_affine(group.column), step, stream_);
      dx_.commit(group.first, block, dx);
    });
  }

 private:
  const Problem& problem_;
  Operand<const void> dy_, x_;
  Operand<void> dx_;
  bool stream_;
};

// Applies given coefficients to all elements, a column per channel. Contiguous activations are
// walked in the order of memory.
void apply_all(const Problem& problem, const InputActivation& x, const OutputActivation& y,
               const Coefficients& values) {
  const ApplyForward apply(problem, x, y);
  const int64_t channels = problem.channels;
  if (problem.layout != Layout::kContiguous) {
    apply_channels_in_reverse(problem, values, apply);
    return;
  }
  // Long rows are cut so that even a few of them keep all threads busy.
  const int64_t cuts = (problem.spatial + kBlockElements - 1) / kBlockElements;
  const int64_t tasks = problem.batch * channels * cuts;
  parallel_for(tasks, problem.spatial / cuts, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t row = begin / cuts;
      const int64_t channel = row % channels;
      // Whole rows go together until the sample ends.
      const int64_t rows = cuts == 1 ? std::min(end - begin, channels - channel) : 1;
      const int64_t position = problem.spatial * (begin % cuts) / cuts;
      const int64_t length = problem.spatial * (begin % cuts + 1) / cuts - position;
      apply({channel, rows, channel}, {row / channels, position, {1, 0, length}}, values);
      begin += rows;
    }
  });
}

}  // namespace

void training_forward(const TrainingForward& op) {
  const Problem& problem = op.problem;
  const double factor = blend_factor(op.running);
  if (op.steps == Steps::kApply) {
    Coefficients values(problem, problem.channels);
    for (int64_t c = 0; c < problem.channels; ++c) values.set(c, combine_channel(op, c, factor));
    if (problem.per_channel() > 0) apply_all(problem, op.x, op.y, values);
    return;
  }
  const Operand<const void> x(problem, op.x);
  const auto reduce = [&](int64_t channel, const ChannelBlock& block) {
    Scratch scratch;
    Moments<double> moments{static_cast<double>(block.rows.elements())};
    loops_of(problem).moments(x.read(channel, block, scratch), rows_of(problem, block),
                              &moments.mean[0], &moments.m2[0]);
    return moments;
  };
  if (op.steps == Steps::kReduce) {
    const auto moments = reduce_channels<Moments<double>>(problem, reduce);
    for (int64_t c = 0; c < problem.channels; ++c) leave_moments(op, c, moments[c]);
    return;
  }
  reduce_and_apply<Moments<double>>(
      problem, reduce,
      [&](int64_t channel, const Moments<double>& moments) {
        return finalize_channel(op, channel, moments, op.count, factor);
      },
      ApplyForward(problem, op.x, op.y));
}

void eval_forward(const EvalForward& op) {
  Coefficients values(op.problem, op.problem.channels);
  for (int64_t c = 0; c < op.problem.channels; ++c) values.set(c, eval_channel(op, c));
  apply_all(op.problem, op.x, op.y, values);
}

void backward(const Backward& op) {
  const Problem& problem = op.problem;
  const Operand<const void> dy(problem, op.dy), x(problem, op.x);
  const bool wants_dx = op.dx.data != nullptr;
  const auto reduce = [&](int64_t channel, const ChannelBlock& block) {
    Scratch dy_scratch, x_scratch;
    GradSums<double> sums;
    loops_of(problem).grad_sums(dy.read(channel, block, dy_scratch),
                                x.read(channel, block, x_scratch), rows_of(problem, block),
                                read(op.mean, channel), &sums.dy[0], &sums.dy_xmu[0]);
    return sums;
  };

  if (op.steps == Steps::kReduce) {
    const auto sums = reduce_channels<GradSums<double>>(problem, reduce);
    for (int64_t c = 0; c < problem.channels; ++c) {
      save_parameter_gradients(op, c, sums[c]);
      leave_grad_sums(op, c, sums[c]);
    }
    return;
  }
  if (op.steps == Steps::kApply) {
    Coefficients values(problem, problem.channels);
    for (int64_t c = 0; c < problem.channels; ++c) values.set(c, combine_gradient(op, c));
    apply_channels_in_reverse(problem, values, ApplyBackward(op));
    return;
  }
  if (op.training && wants_dx) {
    reduce_and_apply<GradSums<double>>(
        problem, reduce,
        [&](int64_t channel, const GradSums<double>& sums) {
          save_parameter_gradients(op, channel, sums);
          return finalize_gradient(op, channel, sums, op.count);
        },
        ApplyBackward(op));
    return;
  }

  // Nothing in dx, if it is wanted, waits for the sums.
  const ApplyForward scale_dy(problem, op.dy, op.dx);
  Coefficients values(problem, problem.channels);
  for (int64_t c = 0; c < problem.channels; ++c) values.set(c, eval_gradient(op, c));
  if (op.dweight.data == nullptr && op.dbias.data == nullptr) {
    if (wants_dx) apply_all(problem, op.dy, op.dx, values);
    return;
  }
  const auto sums =
      reduce_channels<GradSums<double>>(problem, [&](int64_t channel, const ChannelBlock& block) {
        const GradSums<double> sums_of_block = reduce(channel, block);
        if (wants_dx) scale_dy({channel, 1, channel}, block, values);
        return sums_of_block;
      });
  for (int64_t c = 0; c < problem.channels; ++c) save_parameter_gradients(op, c, sums[c]);
}

}  // namespace fastbn::cpu::contiguous
