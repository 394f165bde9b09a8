// SPDX-License-Identifier: BSD-3-Clause
//
// Channels-last (NSC) activations and (N, C) matrices, a block of rows and columns at a time.
//
// The activation is a matrix of N*S rows and C columns. Where C is small, several rows count as one
// wider row, so that a vector is always full; every column still belongs to one channel. Statistics
// of all blocks come first, in pieces whose number depends on the shape alone and whose results are
// merged in their order; the second pass takes the pieces from the end, to meet what the first left
// in cache. (Doing some columns after others, so that they stay in cache between the passes, is
// slower: rows of a power of two collide in it.)
#include <algorithm>
#include <optional>
#include <vector>

#include "batch_norm.h"
#include "channel.h"
#include "coefficients.h"
#include "epilogue.h"
#include "nontemporal.h"
#include "parallel.h"
#include "partition.h"

namespace fastbn::cpu::channels_last {

namespace {

constexpr int64_t kWideRow = 64;  // columns to reach by joining rows
constexpr int64_t kBlockRows = 64;
constexpr int64_t kMinBandElements = 64 << 10;  // so that merging costs little
constexpr int64_t kMaxBands = 32;               // or as many as give kEnoughPieces
constexpr int64_t kEnoughPieces = 128;

// The matrix, its rows cut into bands and its columns into strips: each band of each strip is a
// piece, whose blocks lie one below the other.
class BlockGrid {
 public:
  explicit BlockGrid(const Problem& problem)
      : problem_(problem),
        joined_(std::max<int64_t>(1, kWideRow / problem.channels)),
        columns_(joined_ * problem.channels),
        rows_(problem.per_channel() / joined_),
        rest_(problem.per_channel() % joined_ * problem.channels),
        strips_((columns_ + kMaxBlockColumns - 1) / kMaxBlockColumns) {
    const int64_t row_blocks = (rows_ + kBlockRows - 1) / kBlockRows;
    const int64_t most = std::max(kMaxBands, kEnoughPieces / strips_);
    const int64_t wanted = std::clamp<int64_t>(rows_ * columns_ / kMinBandElements, 1, most);
    rows_per_band_ = (row_blocks + wanted - 1) / wanted * kBlockRows;
    bands_ = (rows_ + rows_per_band_ - 1) / rows_per_band_;
  }

  int64_t joined() const { return joined_; }    // rows that count as one
  int64_t columns() const { return columns_; }  // of a joined row
  int64_t bands() const { return bands_; }
  int64_t pieces() const { return bands_ * strips_; }
  int64_t piece_elements() const { return rows_ * columns_ / pieces(); }
  int64_t rest() const { return rest_; }  // elements behind the last joined row
  int64_t rest_begin() const { return rows_ * columns_; }
  int64_t rows_of(int64_t band) const { return band_end(band) - band * rows_per_band_; }

  // Calls body(band, first column, first element, block) for the blocks of a piece.
  template <typename Body>
  void for_each_block(int64_t piece, Body body) const {
    const int64_t band = piece / strips_;
    const int64_t strip = piece % strips_;
    const int64_t column = cut_begin(problem_, columns_, strip, strips_);
    const int64_t width = cut_begin(problem_, columns_, strip + 1, strips_) - column;
    const int64_t begin = band * rows_per_band_;
    for (int64_t row = begin; row < band_end(band); row += kBlockRows) {
      const int64_t height = std::min(kBlockRows, band_end(band) - row);
      body(band, column, row * columns_ + column, Block2d{height, columns_, width});
    }
  }

 private:
  int64_t band_end(int64_t band) const { return std::min(rows_, (band + 1) * rows_per_band_); }

  const Problem& problem_;
  int64_t joined_, columns_, rows_, rest_, strips_;
  int64_t rows_per_band_, bands_;
};

const char* element(const Problem& problem, const InputActivation& activation, int64_t index) {
  return static_cast<const char*>(activation.data) + index * element_size(problem.dtype);
}
char* element(const Problem& problem, const OutputActivation& activation, int64_t index) {
  return static_cast<char*>(activation.data) + index * element_size(problem.dtype);
}

// The coefficients of a channel, in all of its columns.
template <typename Finalize>
Coefficients coefficients_of(const Problem& problem, const BlockGrid& grid, Finalize finalize) {
  Coefficients coefficients(problem, grid.columns());
  for (int64_t channel = 0; channel < problem.channels; ++channel) {
    const auto values = finalize(channel);
    for (int64_t row = 0; row < grid.joined(); ++row) {
      coefficients.set(row * problem.channels + channel, values);
    }
  }
  return coefficients;
}

// Two sums per column and band, bands outermost.
struct BandSums {
  explicit BandSums(const BlockGrid& grid)
      : first(grid.bands() * grid.columns()), second(grid.bands() * grid.columns()) {}

  std::vector<double> first, second;
};

// Reads an element behind the last joined row.
double rest_value(const Problem& problem, const BlockGrid& grid, const InputActivation& activation,
                  int64_t index) {
  return read({activation.data, problem.dtype, 1}, grid.rest_begin() + index);
}

std::vector<Moments<double>> reduce_statistics(const Problem& problem, const BlockGrid& grid,
                                               const InputActivation& x) {
  const Loops& inner = loops(problem.dtype);
  BandSums partial(grid);
  parallel_for(grid.pieces(), grid.piece_elements(), [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      int64_t seen = 0;
      grid.for_each_block(piece, [&](int64_t band, int64_t column, int64_t first, Block2d block) {
        const int64_t at = band * grid.columns() + column;
        inner.column_moments(element(problem, x, first), block, seen, &partial.first[at],
                             &partial.second[at]);
        seen += block.rows;
      });
    }
  });

  // Merged into those of band 0.
  double* mean = partial.first.data();
  double* m2 = partial.second.data();
  int64_t seen = grid.rows_of(0);
  for (int64_t band = 1; band < grid.bands(); ++band) {
    const auto weights = merge_weights<double>(seen, grid.rows_of(band));
    const int64_t at = band * grid.columns();
    for (int64_t column = 0; column < grid.columns(); ++column) {
      merge_moments(weights, mean[at + column], m2[at + column], mean[column], m2[column]);
    }
    seen += grid.rows_of(band);
  }
  std::vector<Moments<double>> channels(problem.channels);
  for (int64_t column = 0; column < grid.columns(); ++column) {
    channels[column % problem.channels].merge(
        {static_cast<double>(seen), {mean[column]}, {m2[column]}});
  }
  for (int64_t i = 0; i < grid.rest(); ++i) {
    channels[i % problem.channels].merge({1, {rest_value(problem, grid, x, i)}, {0}});
  }
  return channels;
}

// An epilogue for the loops over a block that begins with the element `first`.
EpilogueLoop epilogue_at(const Problem& problem, const Epilogue& epilogue, int64_t first) {
  EpilogueLoop loop{epilogue.function, epilogue.parameter, problem.dtype};
  const int64_t byte = first / masked_elements(problem.dtype);
  if (epilogue.residual.data != nullptr) loop.residual = element(problem, epilogue.residual, first);
  if (epilogue.mask_out != nullptr) loop.mask_out = epilogue.mask_out + byte;
  if (epilogue.mask != nullptr) loop.mask = epilogue.mask + byte;
  return loop;
}

// The elements behind the last joined row, widened to acc_t.
class Rest {
 public:
  Rest(const Problem& problem, const BlockGrid& grid)
      : dtype_(accumulate_dtype(problem.dtype)), storage_(grid.rest()) {}
  Rest(const Problem& problem, const BlockGrid& grid, const InputActivation& from)
      : Rest(problem, grid) {
    const char* first = element(problem, from, grid.rest_begin());
    loops(problem.dtype).pack(first, 1, grid.rest(), storage_.data());
  }

  void* data() { return storage_.data(); }
  double operator[](int64_t i) const { return read({storage_.data(), dtype_, 1}, i); }
  void set(int64_t i, double value) { write({storage_.data(), dtype_, 1}, i, value); }

 private:
  DType dtype_;
  std::vector<double> storage_;  // of acc_t, which is no wider than double
};

// Their dz, which is also left where it is kept.
Rest rest_gradient(const Backward& op, const BlockGrid& grid, const Coefficients& affine) {
  const Problem& problem = op.problem;
  Rest dy(problem, grid, op.dy);
  if (op.epilogue.is_empty() || grid.rest() == 0) return dy;
  Rest dz(problem, grid);
  if (op.epilogue.mask != nullptr) {
    const MaskElements mask(problem, op.epilogue);
    for (int64_t i = 0; i < grid.rest(); ++i) {
      dz.set(i, mask.gradient(grid.rest_begin() + i, dy[i]));
    }
  } else {
    Rest x(problem, grid, op.x);
    EpilogueLoop epilogue = epilogue_at(problem, op.epilogue, 0);
    std::optional<Rest> residual;
    if (epilogue.residual != nullptr) {
      residual.emplace(problem, grid, op.epilogue.residual);
      epilogue.residual = residual->data();
    }
    loops(accumulate_dtype(problem.dtype))
        .activation_grad_columns(dy.data(), x.data(), dz.data(), Block2d{1, 0, grid.rest()},
                                 affine.affine(0), epilogue);
  }
  const OutputActivation kept = kept_dz(op);
  if (kept.data != nullptr) {
    char* first = element(problem, kept, grid.rest_begin());
    loops(problem.dtype).unpack(dz.data(), first, 1, grid.rest());
  }
  return dz;
}

// Calls also(column, first element, block) for each block while it is in cache; `affine` has the
// pre-activation's coefficients of each column, of which the means are needed without an epilogue,
// too. Leaves dz where it is kept.
template <typename Also>
std::vector<GradSums<double>> reduce_gradients(const Backward& op, const BlockGrid& grid,
                                               const Coefficients& affine, Also also) {
  const Problem& problem = op.problem;
  const Loops& inner = loops(problem.dtype);
  const OutputActivation kept = kept_dz(op);
  BandSums partial(grid);
  parallel_for(grid.pieces(), grid.piece_elements(), [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      grid.for_each_block(piece, [&](int64_t band, int64_t column, int64_t first, Block2d block) {
        const int64_t at = band * grid.columns() + column;
        const EpilogueLoop epilogue = epilogue_at(problem, op.epilogue, first);
        const char* dy = element(problem, op.dy, first);
        const char* x = element(problem, op.x, first);
        if (op.epilogue.is_empty()) {
          inner.column_grad_sums(dy, x, block, affine.mean(column), &partial.first[at],
                                 &partial.second[at]);
        } else {
          inner.activated_column_grad_sums(
              dy, x, kept.data == nullptr ? nullptr : element(problem, kept, first), block,
              affine.affine(column), epilogue, &partial.first[at], &partial.second[at]);
        }
        also(column, first, block);
      });
    }
  });

  // Added to those of band 0.
  double* dy = partial.first.data();
  double* dy_xmu = partial.second.data();
  for (int64_t band = 1; band < grid.bands(); ++band) {
    const int64_t at = band * grid.columns();
    for (int64_t column = 0; column < grid.columns(); ++column) {
      dy[column] += dy[at + column];
      dy_xmu[column] += dy_xmu[at + column];
    }
  }
  std::vector<GradSums<double>> channels(problem.channels);
  for (int64_t column = 0; column < grid.columns(); ++column) {
    channels[column % problem.channels].merge({{dy[column]}, {dy_xmu[column]}});
  }
  const Rest rest_dz = rest_gradient(op, grid, affine);
  for (int64_t i = 0; i < grid.rest(); ++i) {
    const int64_t channel = i % problem.channels;
    const double gradient = rest_dz[i];
    const double deviation = rest_value(problem, grid, op.x, i) - read(op.mean, channel);
    channels[channel].merge({{gradient}, {gradient * deviation}});
  }
  return channels;
}

// The second pass: apply(column, first element, block) for all of the matrix, last elements first.
template <typename Apply>
void apply_in_reverse(const BlockGrid& grid, const Apply& apply) {
  if (grid.rest() > 0) apply(0, grid.rest_begin(), Block2d{1, 0, grid.rest()});
  parallel_for(grid.pieces(), grid.piece_elements(), [&](int64_t begin, int64_t end) {
    for (int64_t piece = end; piece-- > begin;) {
      grid.for_each_block(piece, [&](int64_t, int64_t column, int64_t first, Block2d block) {
        apply(column, first, block);
      });
    }
  });
}

// Applies y = (x - mean) * scale + shift, and the epilogue, to the blocks it is called with.
class ApplyForward {
 public:
  ApplyForward(const Problem& problem, const InputActivation& x, const OutputActivation& y,
               const Coefficients& affine, const Epilogue& epilogue = kNone)
      : problem_(problem),
        x_(x),
        y_(y),
        affine_(affine),
        epilogue_(epilogue),
        stream_(streams(problem) && x.data != y.data) {}

  void operator()(int64_t column, int64_t first, const Block2d& block) const {
    const Loops& inner = loops(problem_.dtype);
    const char* x = element(problem_, x_, first);
    char* y = element(problem_, y_, first);
    if (epilogue_.is_empty()) {
      inner.normalize_columns(x, y, block, affine_.affine(column), stream_);
    } else {
      inner.activate_columns(x, y, block, affine_.affine(column),
                             epilogue_at(problem_, epilogue_, first), stream_);
    }
  }

 private:
  static inline const Epilogue kNone = {};

  const Problem& problem_;
  const InputActivation& x_;
  const OutputActivation& y_;
  const Coefficients& affine_;
  const Epilogue& epilogue_;
  bool stream_;
};

// Applies dx = dz * scale + (x - mean) * slope + offset.
class ApplyBackward {
 public:
  ApplyBackward(const Backward& op, const Coefficients& values)
      : op_(op),
        dz_(dz_or_dy(op)),
        values_(values),
        stream_(streams(op.problem) && !is_in_place(op)) {}

  void operator()(int64_t column, int64_t first, const Block2d& block) const {
    const Problem& problem = op_.problem;
    const Loops& inner = loops(problem.dtype);
    const char* dz = element(problem, dz_, first);
    const char* x = element(problem, op_.x, first);
    char* dx = element(problem, op_.dx, first);
    if (has_dz(op_)) {
      inner.grad_input_columns(dz, x, dx, block, values_.grad_affine(column), stream_);
    } else {
      inner.relu_grad_input_columns(dz, x, dx, block, values_.activated_grad(column),
                                    epilogue_at(problem, op_.epilogue, first), op_.training,
                                    stream_);
    }
  }

 private:
  const Backward& op_;
  const InputActivation dz_;
  const Coefficients& values_;
  bool stream_;
};

}  // namespace

void training_forward(const TrainingForward& op) {
  const Problem& problem = op.problem;
  const BlockGrid grid(problem);
  const double factor = blend_factor(op.running);
  if (op.steps == Steps::kApply) {
    const Coefficients affine = coefficients_of(
        problem, grid, [&](int64_t channel) { return combine_channel(op, channel, factor); });
    apply_in_reverse(grid, ApplyForward(problem, op.x, op.y, affine));
    return;
  }
  const std::vector<Moments<double>> moments = reduce_statistics(problem, grid, op.x);
  if (op.steps == Steps::kReduce) {
    for (int64_t c = 0; c < problem.channels; ++c) leave_moments(op, c, moments[c]);
    return;
  }
  const Coefficients affine = coefficients_of(problem, grid, [&](int64_t channel) {
    return finalize_channel(op, channel, moments[channel], op.count, factor);
  });
  apply_in_reverse(grid, ApplyForward(problem, op.x, op.y, affine, op.epilogue));
}

void eval_forward(const EvalForward& op) {
  const BlockGrid grid(op.problem);
  const Coefficients affine =
      coefficients_of(op.problem, grid, [&](int64_t channel) { return eval_channel(op, channel); });
  apply_in_reverse(grid, ApplyForward(op.problem, op.x, op.y, affine, op.epilogue));
}

void backward(const Backward& op) {
  const Problem& problem = op.problem;
  const BlockGrid grid(problem);
  const bool wants_dx = op.dx.data != nullptr;
  if (op.steps == Steps::kApply) {
    const Coefficients values = coefficients_of(
        problem, grid, [&](int64_t channel) { return combine_gradient(op, channel); });
    apply_in_reverse(grid, ApplyBackward(op, values));
    return;
  }

  const Coefficients pre_activations = coefficients_of(problem, grid, [&](int64_t channel) {
    return op.epilogue.is_empty() ? Affine<double>{read(op.mean, channel), 0, 0}
                                  : pre_activation(op, channel);
  });
  if (op.training) {
    const auto sums = reduce_gradients(op, grid, pre_activations, [](int64_t, int64_t, Block2d) {});
    for (int64_t c = 0; c < problem.channels; ++c) {
      save_parameter_gradients(op, c, sums[c]);
      if (op.steps == Steps::kReduce) leave_grad_sums(op, c, sums[c]);
    }
    if (!wants_dx) return;
    const Coefficients values = coefficients_of(problem, grid, [&](int64_t channel) {
      return finalize_activated_gradient(op, channel, sums[channel], op.count);
    });
    apply_in_reverse(grid, ApplyBackward(op, values));
    return;
  }

  // Nothing in dx, if it is wanted, waits for the sums: both in one pass.
  const InputActivation dz = dz_or_dy(op);
  const Coefficients scales =
      coefficients_of(problem, grid, [&](int64_t channel) { return eval_gradient(op, channel); });
  const ApplyForward scale_dz(problem, dz, op.dx, scales);
  if (op.epilogue.is_empty() && op.dweight.data == nullptr && op.dbias.data == nullptr) {
    if (wants_dx) apply_in_reverse(grid, scale_dz);
    return;
  }
  const Coefficients values = coefficients_of(
      problem, grid, [&](int64_t channel) { return eval_activated_gradient(op, channel); });
  const ApplyBackward through_epilogue(op, values);
  const auto apply = [&](int64_t column, int64_t first, const Block2d& block) {
    if (wants_dx && has_dz(op)) {
      scale_dz(column, first, block);
    } else if (wants_dx) {
      through_epilogue(column, first, block);
    }
  };
  const auto sums = reduce_gradients(op, grid, pre_activations, apply);
  if (grid.rest() > 0) apply(0, grid.rest_begin(), Block2d{1, 0, grid.rest()});
  for (int64_t c = 0; c < problem.channels; ++c) save_parameter_gradients(op, c, sums[c]);
}

}  // namespace fastbn::cpu::channels_last
