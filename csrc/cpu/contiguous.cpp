// SPDX-License-Identifier: BSD-3-Clause
//
// Contiguous (NCS) activations, a row of a channel at a time; and those of any strides.
//
// Contiguous, per element: training forward reads x once from memory and once from cache where a
// channel fits there, and writes y; backward reads x and dy likewise and writes dx.
#include "batch_norm.h"
#include "epilogue.h"
#include "nontemporal.h"
#include "reduce_apply.h"
#include "strided_access.h"

namespace fastbn::cpu::contiguous {

namespace {

// Applies y = (x - mean) * scale + shift, and the epilogue, to the blocks it is called with.
class ApplyForward {
 public:
  ApplyForward(const Problem& problem, const InputActivation& x, const OutputActivation& y,
               const Epilogue& epilogue = kNone)
      : problem_(problem),
        x_(problem, x),
        y_(problem, y),
        epilogue_(problem, epilogue, x),
        stream_(streams(problem) && x.data != y.data) {}

  void operator()(const ChannelGroup& group, const ChannelBlock& whole,
                  const Coefficients& values) const {
    const Loops& inner = loops_of(problem_);
    for_each_group_block(problem_, group, whole, [&](const ChannelBlock& block, int64_t step) {
      Scratch in, out, residual;
      const void* x = x_.read(group.first, block, in);
      void* y = y_.target(group.first, block, out);
      const Block2d rows = rows_of(problem_, block);
      const AffineColumns affine = values.affine(group.column);
      if (epilogue_.is_empty()) {
        inner.normalize(x, y, rows, affine, step, stream_);
      } else {
        const EpilogueLoop epilogue = epilogue_.read(group.first, block, residual);
        inner.activate(x, y, rows, affine, step, epilogue, stream_);
        if (epilogue_.writes_mask_apart()) {
          Scratch z;
          inner.activate(x, z.data(), rows, affine, step,
                         {ActivationFunction::kIdentity, 0, epilogue.dtype, epilogue.residual},
                         stream_);
          epilogue_.put_mask(group.first, block, z);
        }
      }
      y_.commit(group.first, block, out);
    });
  }

 private:
  static inline const Epilogue kNone = {};

  const Problem& problem_;
  Operand<const void> x_;
  Operand<void> y_;
  EpilogueOperand epilogue_;
  bool stream_;
};

// Applies dx = dz * scale + (x - mean) * slope + offset.
class ApplyBackward {
 public:
  explicit ApplyBackward(const Backward& op)
      : op_(op),
        dz_data_(dz_or_dy(op)),
        dz_(op.problem, dz_data_),
        x_(op.problem, op.x),
        dx_(op.problem, op.dx),
        epilogue_(op.problem, op.epilogue, op.x),
        stream_(streams(op.problem) && !is_in_place(op)) {}

  void operator()(const ChannelGroup& group, const ChannelBlock& whole,
                  const Coefficients& values) const {
    const Problem& problem = op_.problem;
    const Loops& inner = loops_of(problem);
    for_each_group_block(problem, group, whole, [&](const ChannelBlock& block, int64_t step) {
      Scratch dz_scratch, x_scratch, dx_scratch, residual;
      const void* dz = dz_.read(group.first, block, dz_scratch);
      const void* x = x_.read(group.first, block, x_scratch);
      void* dx = dx_.target(group.first, block, dx_scratch);
      const Block2d rows = rows_of(problem, block);
      if (has_dz(op_)) {
        inner.grad_input(dz, x, dx, rows, values.grad_affine(group.column), step, stream_);
      } else {
        inner.relu_grad_input(dz, x, dx, rows, values.activated_grad(group.column), step,
                              epilogue_.read(group.first, block, residual), op_.training, stream_);
      }
      dx_.commit(group.first, block, dx_scratch);
    });
  }

 private:
  const Backward& op_;
  InputActivation dz_data_;
  Operand<const void> dz_, x_;
  Operand<void> dx_;
  EpilogueOperand epilogue_;
  bool stream_;
};

// Sums up the gradients of the blocks it is called with, and leaves dz where it is kept.
class ReduceGradients {
 public:
  explicit ReduceGradients(const Backward& op)
      : op_(op),
        dy_(op.problem, op.dy),
        x_(op.problem, op.x),
        kept_data_(kept_dz(op)),
        kept_(op.problem, kept_data_),
        epilogue_(op.problem, op.epilogue, op.x),
        affine_(op.problem, op.epilogue.is_empty() ? 0 : op.problem.channels) {
    if (op.epilogue.is_empty()) return;
    for (int64_t c = 0; c < op.problem.channels; ++c) affine_.set(c, pre_activation(op, c));
  }

  GradSums<double> operator()(int64_t channel, const ChannelBlock& block) const {
    const Problem& problem = op_.problem;
    const Loops& inner = loops_of(problem);
    const Block2d rows = rows_of(problem, block);
    Scratch dy_scratch, x_scratch, residual, out;
    const void* dy = dy_.read(channel, block, dy_scratch);
    const void* x = x_.read(channel, block, x_scratch);
    GradSums<double> sums;
    if (epilogue_.is_empty()) {
      inner.grad_sums(dy, x, rows, read(op_.mean, channel), &sums.dy[0], &sums.dy_xmu[0]);
      return sums;
    }
    const bool keeps = kept_data_.data != nullptr;
    if (epilogue_.reads_mask_apart()) {
      epilogue_.mask_gradient(channel, block, dy_scratch);
      inner.activated_grad_sums(dy, x, nullptr, rows, affine_.affine(channel),
                                {ActivationFunction::kIdentity, 0, problem.dtype}, &sums.dy[0],
                                &sums.dy_xmu[0]);
      if (keeps) kept_.commit(channel, block, dy_scratch);
      return sums;
    }
    void* dz = keeps ? kept_.target(channel, block, out) : nullptr;
    inner.activated_grad_sums(dy, x, dz, rows, affine_.affine(channel),
                              epilogue_.read(channel, block, residual), &sums.dy[0],
                              &sums.dy_xmu[0]);
    if (keeps) kept_.commit(channel, block, out);
    return sums;
  }

 private:
  const Backward& op_;
  Operand<const void> dy_, x_;
  OutputActivation kept_data_;
  Operand<void> kept_;
  EpilogueOperand epilogue_;
  Coefficients affine_;
};

// Applies given coefficients to all elements, a column per channel. Contiguous activations are
// walked in the order of memory.
void apply_all(const Problem& problem, const ApplyForward& apply, const Coefficients& values) {
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
      const int64_t position = cut_begin(problem, problem.spatial, begin % cuts, cuts);
      const int64_t length = cut_begin(problem, problem.spatial, begin % cuts + 1, cuts) - position;
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
    if (problem.per_channel() > 0) apply_all(problem, ApplyForward(problem, op.x, op.y), values);
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
      ApplyForward(problem, op.x, op.y, op.epilogue));
}

void eval_forward(const EvalForward& op) {
  Coefficients values(op.problem, op.problem.channels);
  for (int64_t c = 0; c < op.problem.channels; ++c) values.set(c, eval_channel(op, c));
  apply_all(op.problem, ApplyForward(op.problem, op.x, op.y, op.epilogue), values);
}

void backward(const Backward& op) {
  const Problem& problem = op.problem;
  const bool wants_dx = op.dx.data != nullptr;
  if (op.steps == Steps::kApply) {
    Coefficients values(problem, problem.channels);
    for (int64_t c = 0; c < problem.channels; ++c) values.set(c, combine_gradient(op, c));
    apply_channels_in_reverse(problem, values, ApplyBackward(op));
    return;
  }
  const ReduceGradients reduce(op);
  if (op.steps == Steps::kReduce) {
    const auto sums = reduce_channels<GradSums<double>>(problem, reduce);
    for (int64_t c = 0; c < problem.channels; ++c) {
      save_parameter_gradients(op, c, sums[c]);
      leave_grad_sums(op, c, sums[c]);
    }
    return;
  }
  if (op.training && wants_dx) {
    reduce_and_apply<GradSums<double>>(
        problem, reduce,
        [&](int64_t channel, const GradSums<double>& sums) {
          save_parameter_gradients(op, channel, sums);
          return finalize_activated_gradient(op, channel, sums, op.count);
        },
        ApplyBackward(op));
    return;
  }

  // Nothing in dx, if it is wanted, waits for the sums.
  Coefficients values(problem, problem.channels);
  for (int64_t c = 0; c < problem.channels; ++c) {
    if (has_dz(op)) {
      values.set(c, eval_gradient(op, c));
    } else {
      values.set(c, eval_activated_gradient(op, c));
    }
  }
  const InputActivation dz = dz_or_dy(op);
  const ApplyForward scale_dz(problem, dz, op.dx);
  if (op.epilogue.is_empty() && op.dweight.data == nullptr && op.dbias.data == nullptr) {
    if (wants_dx) apply_all(problem, scale_dz, values);
    return;
  }
  const ApplyBackward through_epilogue(op);
  const auto sums =
      reduce_channels<GradSums<double>>(problem, [&](int64_t channel, const ChannelBlock& block) {
        const GradSums<double> sums_of_block = reduce(channel, block);
        const ChannelGroup group{channel, 1, channel};
        if (wants_dx && has_dz(op)) {
          scale_dz(group, block, values);
        } else if (wants_dx) {
          through_epilogue(group, block, values);
        }
        return sums_of_block;
      });
  for (int64_t c = 0; c < problem.channels; ++c) save_parameter_gradients(op, c, sums[c]);
}

}  // namespace fastbn::cpu::contiguous
