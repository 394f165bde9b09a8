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

// Writes y for the blocks it is called with.
class Normalizer {
 public:
  Normalizer(const Problem& problem, const Activation& x, const Activation& y)
      : problem_(problem), x_(problem, x), y_(problem, y), stream_(streams(problem)) {}

  void operator()(int64_t channel, const Block& block, const Affine& affine) const {
    Scratch in, out;
    loops_of(problem_).normalize(x_.read(channel, block, in), y_.target(channel, block, out),
                                 run_of(problem_, block), affine, stream_);
    y_.commit(channel, block, out);
  }

 private:
  const Problem& problem_;
  Operand x_, y_;
  bool stream_;
};

// Writes all of y with given coefficients: affine(channel). Contiguous activations are walked in
// the order of memory.
template <typename AffineOf>
void normalize_all(const Problem& problem, const Activation& x, const Activation& y,
                   AffineOf affine) {
  const Normalizer normalize(problem, x, y);
  const int64_t channels = problem.channels;
  if (problem.layout != Layout::kNCS) {
    apply_only(problem, [&](int64_t channel, const Block& block) {
      normalize(channel, block, affine(channel));
    });
    return;
  }
  // acc is no wider than double.
  std::vector<double> storage(3 * channels);
  char* mean = reinterpret_cast<char*>(storage.data());
  const DType acc = accumulate_dtype(problem.dtype);
  const int64_t acc_size = element_size(acc);
  char* scale = mean + channels * acc_size;
  char* shift = scale + channels * acc_size;
  for (int64_t c = 0; c < channels; ++c) {
    const Affine a = affine(c);
    write({mean, acc}, c, a.mean);
    write({scale, acc}, c, a.scale);
    write({shift, acc}, c, a.shift);
  }
  const bool stream = streams(problem);
  const int64_t size = element_size(problem.dtype);
  const int64_t spatial = problem.spatial;
  // Long rows are cut so that even a few of them keep all threads busy.
  const int64_t chunks = (spatial + kBlockElements - 1) / kBlockElements;
  parallel_for(
      problem.batch * channels * chunks, spatial / chunks, [&](int64_t begin, int64_t end) {
        while (begin < end) {
          const int64_t row = begin / chunks;
          const int64_t first = spatial * (begin % chunks) / chunks;
          const int64_t channel = row % channels;
          // Whole rows go together until the sample ends.
          const int64_t rows = chunks == 1 ? std::min(end - begin, channels - channel) : 1;
          const int64_t length = spatial * (begin % chunks + 1) / chunks - first;
          const int64_t offset = (row * spatial + first) * size;
          const int64_t at = channel * acc_size;
          loops(problem.dtype)
              .normalize_channels(static_cast<const char*>(x.data) + offset,
                                  static_cast<char*>(y.data) + offset, {rows, spatial, length},
                                  {mean + at, scale + at, shift + at}, stream);
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
  // Statistics are saved once, apart from the passes that share a channel.
  std::vector<Affine> affine;
  for (int64_t c = 0; c < op.problem.channels; ++c) affine.push_back(inference_channel(op, c));
  normalize_all(op.problem, op.x, op.y, [&](int64_t channel) { return affine[channel]; });
}

void backward_runs(const Backward& op) {
  const Problem& problem = op.problem;
  const Operand dy(problem, op.dy), x(problem, op.x), dx(problem, op.dx);
  const Normalizer scale_dy(problem, op.dy, op.dx);
  const bool wants_dx = op.dx.data != nullptr;
  const bool stream = streams(problem);

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
    reduce_and_apply<GradSums>(
        problem, sums_of, finish,
        [&](int64_t channel, const Block& block, const GradAffine& affine) {
          if (!wants_dx) return;
          Scratch dy_scratch, x_scratch, dx_scratch;
          loops_of(problem).grad_input(
              dy.read(channel, block, dy_scratch), x.read(channel, block, x_scratch),
              dx.target(channel, block, dx_scratch), run_of(problem, block), affine, stream);
          dx.commit(channel, block, dx_scratch);
        });
  } else if (op.dweight.data != nullptr || op.dbias.data != nullptr) {
    // Nothing in dx waits for the sums: both in one pass.
    reduce_and_apply<GradSums>(
        problem,
        [&](int64_t channel, const Block& block) {
          const GradSums sums = sums_of(channel, block);
          if (wants_dx) scale_dy(channel, block, inference_gradient(op, channel));
          return sums;
        },
        finish, [](int64_t, const Block&, const GradAffine&) {});
  } else if (wants_dx) {
    normalize_all(problem, op.dy, op.dx,
                  [&](int64_t channel) { return inference_gradient(op, channel); });
  }
}

}  // namespace fastbn::cpu
