// SPDX-License-Identifier: BSD-3-Clause
//
// Contiguous (NCS) and strided activations, a run of a channel at a time.
//
// Contiguous, per element: training forward reads x once from memory and once from cache where a
// channel fits there, and writes y; backward reads x and dy likewise and writes dx.
#include "runs.h"

#include "batch_norm.h"
#include "stream.h"

namespace fastbn::cpu {

namespace {

// Writes y = (x - mean) * scale + shift for the blocks it is called with.
class Normalizer {
 public:
  Normalizer(const Problem& problem, const Activation& x, const Activation& y)
      : problem_(problem), x_(problem, x), y_(problem, y), stream_(streams(problem)) {}

  void operator()(const ChannelGroup& group, const Block& whole, const Coefficients& values) const {
    for_each_stretch(problem_, group, whole, [&](const Block& block, int64_t step) {
      Scratch in, out;
      loops_of(problem_).normalize(x_.read(group.first, block, in),
                                   y_.target(group.first, block, out), run_of(problem_, block),
                                   values.affine(group.column), step, stream_);
      y_.commit(group.first, block, out);
    });
  }

 private:
  const Problem& problem_;
  Operand x_, y_;
  bool stream_;
};

// Writes all of y with given coefficients, a column per channel. Contiguous activations are walked
// in the order of memory.
void normalize_all(const Problem& problem, const Activation& x, const Activation& y,
                   const Coefficients& values) {
  const Normalizer normalize(problem, x, y);
  const int64_t channels = problem.channels;
  if (problem.layout != Layout::kNCS) {
    apply_only(problem, [&](int64_t channel, const Block& block) {
      normalize({channel, 1, channel}, block, values);
    });
    return;
  }
  // Long rows are cut so that even a few of them keep all threads busy.
  const int64_t chunks = (problem.spatial + kBlockElements - 1) / kBlockElements;
  const int64_t tasks = problem.batch * channels * chunks;
  parallel_for(tasks, problem.spatial / chunks, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t row = begin / chunks;
      const int64_t channel = row % channels;
      // Whole rows go together until the sample ends.
      const int64_t rows = chunks == 1 ? std::min(end - begin, channels - channel) : 1;
      const int64_t position = problem.spatial * (begin % chunks) / chunks;
      const int64_t length = problem.spatial * (begin % chunks + 1) / chunks - position;
      normalize({channel, rows, channel}, {row / channels, position, {1, 0, length}}, values);
      begin += rows;
    }
  });
}

}  // namespace

void training_forward_runs(const TrainingForward& op) {
  const Problem& problem = op.problem;
  const Operand x(problem, op.x);
  const double factor = blend_factor(op);
  reduce_and_apply<Moments>(
      problem,
      [&](int64_t channel, const Block& block) {
        Scratch scratch;
        Moments moments{static_cast<double>(block.elements())};
        loops_of(problem).moments(x.read(channel, block, scratch), run_of(problem, block),
                                  &moments.mean, &moments.m2);
        return moments;
      },
      [&](int64_t channel, const Moments& moments) {
        return finish_channel(op, channel, moments, factor);
      },
      Normalizer(problem, op.x, op.y));
}

void inference_forward_runs(const InferenceForward& op) {
  Coefficients values(op.problem, op.problem.channels);
  for (int64_t c = 0; c < op.problem.channels; ++c) values.set(c, inference_channel(op, c));
  normalize_all(op.problem, op.x, op.y, values);
}

void backward_runs(const Backward& op) {
  const Problem& problem = op.problem;
  const Operand dy(problem, op.dy), x(problem, op.x), dx(problem, op.dx);
  const bool wants_dx = op.dx.data != nullptr;

  auto sums_of = [&](int64_t channel, const Block& block) {
    Scratch dy_scratch, x_scratch;
    GradSums sums;
    loops_of(problem).grad_sums(dy.read(channel, block, dy_scratch),
                                x.read(channel, block, x_scratch), run_of(problem, block),
                                read(op.mean, channel), &sums.dy, &sums.dy_xmu);
    return sums;
  };
  auto finish = [&](int64_t channel, const GradSums& sums) {
    return finish_gradient(op, channel, sums);
  };

  if (op.training) {
    const bool stream = streams(problem);
    reduce_and_apply<GradSums>(
        problem, sums_of, finish,
        [&](const ChannelGroup& group, const Block& whole, const Coefficients& values) {
          if (!wants_dx) return;
          for_each_stretch(problem, group, whole, [&](const Block& block, int64_t step) {
            Scratch dy_scratch, x_scratch, dx_scratch;
            loops_of(problem).grad_input(
                dy.read(group.first, block, dy_scratch), x.read(group.first, block, x_scratch),
                dx.target(group.first, block, dx_scratch), run_of(problem, block),
                values.grad_affine(group.column), step, stream);
            dx.commit(group.first, block, dx_scratch);
          });
        });
    return;
  }

  const Normalizer scale_dy(problem, op.dy, op.dx);
  Coefficients values(problem, problem.channels);
  for (int64_t c = 0; c < problem.channels; ++c) values.set(c, inference_gradient(op, c));
  if (op.dweight.data != nullptr || op.dbias.data != nullptr) {
    // Nothing in dx waits for the sums: both in one pass.
    reduce_and_apply<GradSums>(
        problem,
        [&](int64_t channel, const Block& block) {
          const GradSums sums = sums_of(channel, block);
          if (wants_dx) scale_dy({channel, 1, channel}, block, values);
          return sums;
        },
        finish, [](const ChannelGroup&, const Block&, const Coefficients&) {});
  } else if (wants_dx) {
    normalize_all(problem, op.dy, op.dx, values);
  }
}

}  // namespace fastbn::cpu
