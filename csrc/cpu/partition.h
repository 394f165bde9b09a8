// SPDX-License-Identifier: BSD-3-Clause
//
// Cuts the channels of a contiguous or generic problem into blocks.
//
// A block is what is summed in acc_t and swept twice while it sits in the first-level cache.
// Sixteen blocks make a piece, the unit threads share. Both depend on the shape alone, and results
// are merged in their order: that is why the number of threads does not change a bit of them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../core/mask.h"
#include "../core/problem.h"
#include "simd/loops.h"

namespace fastbn::cpu {

constexpr int64_t kBlockElements = 4096;
constexpr int64_t kBlocksPerPiece = 16;

// Where the part `index` begins of `length` elements that are cut into `parts` parts, between two
// bytes of a mask where there can be one: then no two threads write the same.
inline int64_t cut_begin(const Problem& problem, int64_t length, int64_t index, int64_t parts) {
  const int64_t together = masked_elements(problem.dtype);
  const int64_t unit = length % together == 0 ? together : 1;
  return length / unit * index / parts * unit;
}

// A block of one channel: the positions [position, position + rows.columns) of `rows.rows` samples
// from `sample` on.
struct ChannelBlock {
  int64_t sample;
  int64_t position;
  Block2d rows;
};

// The blocks of a channel.
class Partition {
 public:
  explicit Partition(const Problem& problem)
      : problem_(problem),
        cuts_(std::max<int64_t>(1, (problem.spatial + kBlockElements - 1) / kBlockElements)),
        samples_(std::max<int64_t>(1, kBlockElements / problem.spatial)) {}

  int64_t blocks() const { return (problem_.batch + samples_ - 1) / samples_ * cuts_; }
  int64_t pieces() const { return (blocks() + kBlocksPerPiece - 1) / kBlocksPerPiece; }
  int64_t piece_begin(int64_t piece) const { return piece * kBlocksPerPiece; }
  int64_t piece_end(int64_t piece) const {
    return std::min(blocks(), (piece + 1) * kBlocksPerPiece);
  }

  ChannelBlock operator[](int64_t index) const {
    const int64_t sample = index / cuts_ * samples_;
    const int64_t cut = index % cuts_;
    const int64_t begin = cut_begin(problem_, problem_.spatial, cut, cuts_);
    const int64_t end = cut_begin(problem_, problem_.spatial, cut + 1, cuts_);
    const int64_t rows = std::min(samples_, problem_.batch - sample);
    return {sample, begin, {rows, problem_.channels * problem_.spatial, end - begin}};
  }

 private:
  Problem problem_;
  int64_t cuts_;     // of a sample's positions
  int64_t samples_;  // of a block
};

// Adjacent channels; coefficients of the first are at `column`.
struct ChannelGroup {
  int64_t first;
  int64_t count;
  int64_t column;
};

// Calls body(block, step) for what a block is to the channels of a group: the block itself where
// the group is one channel, else each sample's rows of all its channels, with the step of their
// coefficients.
template <typename Body>
void for_each_group_block(const Problem& problem, const ChannelGroup& group,
                          const ChannelBlock& block, Body body) {
  if (group.count == 1) {
    body(block, 0);
    return;
  }
  for (int64_t sample = 0; sample < block.rows.rows; ++sample) {
    const Block2d rows{group.count, problem.spatial, block.rows.columns};
    body(ChannelBlock{block.sample + sample, block.position, rows}, 1);
  }
}

}  // namespace fastbn::cpu
