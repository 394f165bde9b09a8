// SPDX-License-Identifier: BSD-3-Clause
//
// Cuts the channels of a contiguous or strided problem into blocks, and walks them.
//
// A block is what is summed in acc and swept twice while it sits in the first-level cache. Sixteen
// blocks make a piece, the unit threads share. Both depend on the shape alone and results are
// merged in their order, which is why threads do not change a bit of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "channel.h"
#include "coefficients.h"
#include "parallel.h"

namespace fastbn::cpu {

constexpr int64_t kBlockElements = 4096;
constexpr int64_t kBlocksPerPiece = 16;

// Elements [position, position + run.length) of `run.segments` samples from `sample` on.
struct Block {
  int64_t sample;
  int64_t position;
  Run run;

  int64_t elements() const { return run.segments * run.length; }
};

class BlockList {
 public:
  explicit BlockList(const Problem& problem)
      : problem_(problem),
        chunks_(std::max<int64_t>(1, (problem.spatial + kBlockElements - 1) / kBlockElements)),
        samples_(std::max<int64_t>(1, kBlockElements / problem.spatial)) {}

  int64_t blocks() const { return (problem_.batch + samples_ - 1) / samples_ * chunks_; }
  int64_t pieces() const { return (blocks() + kBlocksPerPiece - 1) / kBlocksPerPiece; }
  int64_t piece_begin(int64_t piece) const { return piece * kBlocksPerPiece; }
  int64_t piece_end(int64_t piece) const {
    return std::min(blocks(), (piece + 1) * kBlocksPerPiece);
  }

  Block operator[](int64_t index) const {
    const int64_t sample = index / chunks_ * samples_;
    const int64_t chunk = index % chunks_;
    const int64_t begin = problem_.spatial * chunk / chunks_;
    const int64_t end = problem_.spatial * (chunk + 1) / chunks_;
    const int64_t segments = std::min(samples_, problem_.batch - sample);
    return {sample, begin, {segments, problem_.channels * problem_.spatial, end - begin}};
  }

 private:
  Problem problem_;
  int64_t chunks_;   // per sample
  int64_t samples_;  // per block
};

// Channels of a contiguous activation that are finished together, so that the second pass writes
// stretches of this many bytes where a single channel's are short.
constexpr int64_t kGroupBytes = 4 << 10;

// Adjacent channels; coefficients of the first are at `column`.
struct ChannelGroup {
  int64_t first;
  int64_t count;
  int64_t column;
};

// Reduces every channel, finishes it, and applies what came out to its elements:
//   reduce(channel, block) -> Sums;
//   finish(channel, Sums) -> Affine or GradAffine;
//   apply(group, block, Coefficients).
// The second pass walks backward, to meet what the first one left in cache.
template <typename Sums, typename Reduce, typename Finish, typename Apply>
void reduce_and_apply(const Problem& problem, Reduce reduce, Finish finish, Apply apply) {
  const BlockList blocks(problem);
  const int64_t channels = problem.channels;
  const int64_t pieces = blocks.pieces();
  const int64_t piece_elements = problem.per_channel() / pieces;

  auto reduce_piece = [&](int64_t channel, int64_t piece) {
    Sums sums;
    for (int64_t b = blocks.piece_begin(piece); b < blocks.piece_end(piece); ++b) {
      sums.merge(reduce(channel, blocks[b]));
    }
    return sums;
  };
  auto apply_piece = [&](const ChannelGroup& group, int64_t piece, const Coefficients& values) {
    for (int64_t b = blocks.piece_end(piece); b-- > blocks.piece_begin(piece);) {
      apply(group, blocks[b], values);
    }
  };

  const int64_t share = std::max<int64_t>(1, channels / (4 * num_threads()));
  const bool enough_channels = channels >= 4 * num_threads();
  if (enough_channels || pieces == 1) {
    // A thread takes whole channels, each while it is in cache.
    int64_t together = 1;
    if (problem.layout == Layout::kNCS) {
      const int64_t row_bytes = problem.spatial * element_size(problem.dtype);
      together = std::clamp<int64_t>(kGroupBytes / row_bytes, 1, share);
    }
    const int64_t groups = (channels + together - 1) / together;
    parallel_for(groups, together * problem.per_channel(), [&](int64_t begin, int64_t end) {
      Coefficients values(problem, together);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i * together;
        const ChannelGroup group{first, std::min(together, channels - first), 0};
        for (int64_t c = 0; c < group.count; ++c) {
          Sums sums;
          for (int64_t p = 0; p < pieces; ++p) sums.merge(reduce_piece(first + c, p));
          values.set(c, finish(first + c, sums));
        }
        for (int64_t piece = pieces; piece-- > 0;) apply_piece(group, piece, values);
      }
    });
    return;
  }
  // Threads share the pieces of a channel.
  std::vector<Sums> partial(channels * pieces);
  parallel_for(channels * pieces, piece_elements, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) partial[i] = reduce_piece(i / pieces, i % pieces);
  });
  Coefficients values(problem, channels);
  for (int64_t channel = 0; channel < channels; ++channel) {
    Sums sums;
    for (int64_t piece = 0; piece < pieces; ++piece) sums.merge(partial[channel * pieces + piece]);
    values.set(channel, finish(channel, sums));
  }
  parallel_for(channels * pieces, piece_elements, [&](int64_t begin, int64_t end) {
    for (int64_t i = end; i-- > begin;) {
      const int64_t channel = i / pieces;
      apply_piece({channel, 1, channel}, i % pieces, values);
    }
  });
}

// Calls body(block, step) for the stretches of a block of a group: the block itself where the group
// is one channel, else each sample's part of all its channels, with the step of their coefficients.
template <typename Body>
void for_each_stretch(const Problem& problem, const ChannelGroup& group, const Block& block,
                      Body body) {
  if (group.count == 1) {
    body(block, 0);
    return;
  }
  for (int64_t sample = 0; sample < block.run.segments; ++sample) {
    const Run run{group.count, problem.spatial, block.run.length};
    body(Block{block.sample + sample, block.position, run}, 1);
  }
}

// One pass over everything: apply(channel, block).
template <typename Apply>
void apply_only(const Problem& problem, Apply apply) {
  const BlockList blocks(problem);
  const int64_t pieces = blocks.pieces();
  const int64_t tasks = problem.channels * pieces;
  parallel_for(tasks, problem.per_channel() / pieces, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t last = blocks.piece_end(i % pieces);
      for (int64_t b = blocks.piece_begin(i % pieces); b < last; ++b) apply(i / pieces, blocks[b]);
    }
  });
}

// A block's worth of acc on the stack, with room in front for loads that begin before a short run.
class Scratch {
 public:
  void* data() { return storage_ + kMaxLanes; }

 private:
  alignas(64) double storage_[kMaxLanes + kBlockElements];
};

// Where the elements of a block are. A contiguous activation is read and written in place. A
// strided one passes through scratch, as one run of acc.
class Operand {
 public:
  Operand(const Problem& problem, const Activation& activation)
      : problem_(problem), activation_(activation) {}

  // The block's elements, to be walked with run_of(block); valid as long as scratch.
  const void* read(int64_t channel, const Block& block, Scratch& scratch) const {
    if (problem_.layout == Layout::kNCS) return address(channel, block);
    for_each_even_stretch(
        channel, block,
        [&](char* element, int64_t stride, int64_t length, char* to) {
          loops(problem_.dtype).gather(element, stride, length, to);
        },
        scratch);
    return scratch.data();
  }

  // Where to put the block's elements; commit() moves them on.
  void* target(int64_t channel, const Block& block, Scratch& scratch) const {
    return problem_.layout == Layout::kNCS ? address(channel, block) : scratch.data();
  }
  void commit(int64_t channel, const Block& block, Scratch& scratch) const {
    if (problem_.layout == Layout::kNCS) return;
    for_each_even_stretch(
        channel, block,
        [&](char* element, int64_t stride, int64_t length, char* from) {
          loops(problem_.dtype).scatter(from, element, stride, length);
        },
        scratch);
  }

 private:
  char* at(int64_t offset) const {
    return static_cast<char*>(activation_.data) + offset * element_size(problem_.dtype);
  }

  char* address(int64_t channel, const Block& block) const {
    return at((block.sample * problem_.channels + channel) * problem_.spatial + block.position);
  }

  // Calls body(element, stride, length, scratch) for each stretch of evenly spaced elements.
  template <typename Body>
  void for_each_even_stretch(int64_t channel, const Block& block, Body body,
                             Scratch& scratch) const {
    char* packed = static_cast<char*>(scratch.data());
    const int64_t acc_size = element_size(accumulate_dtype(problem_.dtype));
    const int64_t first =
        block.sample * activation_.batch_stride + channel * activation_.channel_stride;
    if (activation_.spatial_dims == 0) {
      body(at(first), activation_.batch_stride, block.run.segments, packed);
      return;
    }
    const int inner = activation_.spatial_dims - 1;
    const int64_t inner_size = activation_.sizes[inner];
    const int64_t inner_stride = activation_.strides[inner];
    for (int64_t segment = 0; segment < block.run.segments; ++segment) {
      const int64_t begin = first + segment * activation_.batch_stride;
      int64_t position = block.position;
      const int64_t end = block.position + block.run.length;
      while (position < end) {
        const int64_t column = position % inner_size;
        const int64_t length = std::min(inner_size - column, end - position);
        int64_t offset = begin + column * inner_stride;
        int64_t index = position / inner_size;
        for (int d = inner - 1; d >= 0; --d) {
          offset += index % activation_.sizes[d] * activation_.strides[d];
          index /= activation_.sizes[d];
        }
        body(at(offset), inner_stride, length, packed);
        packed += length * acc_size;
        position += length;
      }
    }
  }

  const Problem& problem_;
  const Activation& activation_;
};

// How the loops see a block that Operand::read returned, and which loops.
inline Run run_of(const Problem& problem, const Block& block) {
  if (problem.layout == Layout::kNCS) return block.run;
  return {1, 0, block.elements()};
}
inline const Loops& loops_of(const Problem& problem) {
  return loops(problem.layout == Layout::kNCS ? problem.dtype : accumulate_dtype(problem.dtype));
}

}  // namespace fastbn::cpu
