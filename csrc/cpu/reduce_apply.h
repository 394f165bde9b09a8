// SPDX-License-Identifier: BSD-3-Clause
//
// The two passes over the channels of a contiguous or generic problem, apart and together.
// Throughout,
//   reduce(channel, block) -> Sums            of a block,
//   finalize(channel, Sums) -> coefficients   of a channel,
//   apply(group, block, Coefficients)         to the elements of a block.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "coefficients.h"
#include "parallel.h"
#include "partition.h"

namespace fastbn::cpu {

template <typename Sums, typename Reduce>
Sums reduce_piece(const Partition& partition, int64_t channel, int64_t piece,
                  const Reduce& reduce) {
  Sums sums;
  for (int64_t b = partition.piece_begin(piece); b < partition.piece_end(piece); ++b) {
    sums.merge(reduce(channel, partition[b]));
  }
  return sums;
}

// The first pass: the sums of every channel. Threads share the pieces of all.
template <typename Sums, typename Reduce>
std::vector<Sums> reduce_channels(const Problem& problem, const Reduce& reduce) {
  const Partition partition(problem);
  const int64_t pieces = partition.pieces();
  std::vector<Sums> partial(problem.channels * pieces);
  parallel_for(problem.channels * pieces, problem.per_channel() / pieces,
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   partial[i] = reduce_piece<Sums>(partition, i / pieces, i % pieces, reduce);
                 }
               });
  std::vector<Sums> channels(problem.channels);
  for (int64_t i = 0; i < problem.channels * pieces; ++i) channels[i / pieces].merge(partial[i]);
  return channels;
}

// A piece from its end, to meet what the first pass left in cache.
template <typename Apply>
void apply_piece_in_reverse(const Partition& partition, const ChannelGroup& group, int64_t piece,
                            const Coefficients& values, const Apply& apply) {
  for (int64_t b = partition.piece_end(piece); b-- > partition.piece_begin(piece);) {
    apply(group, partition[b], values);
  }
}

// The second pass, a column of coefficients per channel, from the end.
template <typename Apply>
void apply_channels_in_reverse(const Problem& problem, const Coefficients& values,
                               const Apply& apply) {
  const Partition partition(problem);
  const int64_t pieces = partition.pieces();
  parallel_for(problem.channels * pieces, problem.per_channel() / pieces,
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = end; i-- > begin;) {
                   const ChannelGroup channel{i / pieces, 1, i / pieces};
                   apply_piece_in_reverse(partition, channel, i % pieces, values, apply);
                 }
               });
}

// Channels of a contiguous activation that are finalized together, so that the second pass writes
// so many adjacent bytes where a single channel's rows are short.
constexpr int64_t kGroupBytes = 4 << 10;

// Channels that a thread takes at once, of so many that every thread has some to choose from.
inline int64_t channels_per_group(const Problem& problem) {
  if (problem.layout != Layout::kContiguous) return 1;
  const int64_t row_bytes = problem.spatial * element_size(problem.dtype);
  const int64_t share = std::max<int64_t>(1, problem.channels / (4 * num_threads()));
  return std::clamp<int64_t>(kGroupBytes / row_bytes, 1, share);
}

// Both passes. Where there are channels enough, a thread takes whole ones, each while it is in
// cache; else threads share the pieces of a channel.
template <typename Sums, typename Reduce, typename Finalize, typename Apply>
void reduce_and_apply(const Problem& problem, const Reduce& reduce, const Finalize& finalize,
                      const Apply& apply) {
  const Partition partition(problem);
  const int64_t channels = problem.channels;
  const int64_t pieces = partition.pieces();
  if (channels < 4 * num_threads() && pieces > 1) {
    const std::vector<Sums> sums = reduce_channels<Sums>(problem, reduce);
    Coefficients values(problem, channels);
    for (int64_t c = 0; c < channels; ++c) values.set(c, finalize(c, sums[c]));
    apply_channels_in_reverse(problem, values, apply);
    return;
  }
  const int64_t together = channels_per_group(problem);
  const int64_t groups = (channels + together - 1) / together;
  parallel_for(groups, together * problem.per_channel(), [&](int64_t begin, int64_t end) {
    Coefficients values(problem, together);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * together;
      const ChannelGroup group{first, std::min(together, channels - first), 0};
      for (int64_t c = 0; c < group.count; ++c) {
        Sums sums;
        for (int64_t piece = 0; piece < pieces; ++piece) {
          sums.merge(reduce_piece<Sums>(partition, first + c, piece, reduce));
        }
        values.set(c, finalize(first + c, sums));
      }
      for (int64_t piece = pieces; piece-- > 0;) {
        apply_piece_in_reverse(partition, group, piece, values, apply);
      }
    }
  });
}

}  // namespace fastbn::cpu
