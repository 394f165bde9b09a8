// SPDX-License-Identifier: BSD-3-Clause
//
// Where the elements of a block are. Those of a contiguous activation are read and written in
// place; those of a generic one pass through scratch memory, as one row of acc_t.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../core/problem.h"
#include "partition.h"
#include "simd/loops.h"

namespace fastbn::cpu {

// A block's worth of acc_t on the stack, with room in front for loads that begin before a short
// row.
class Scratch {
 public:
  void* data() { return storage_ + kMaxLanes; }

 private:
  alignas(64) double storage_[kMaxLanes + kBlockElements];
};

// The block as the loops see it once Operand has located it, and the loops for it.
inline Block2d rows_of(const Problem& problem, const ChannelBlock& block) {
  if (problem.layout == Layout::kContiguous) return block.rows;
  return {1, 0, block.rows.elements()};
}
inline const Loops& loops_of(const Problem& problem) {
  const bool in_place = problem.layout == Layout::kContiguous;
  return loops(in_place ? problem.dtype : accumulate_dtype(problem.dtype));
}

// An activation, `Data` being `const void` or `void`.
template <typename Data>
class Operand {
 public:
  Operand(const Problem& problem, const Activation<Data>& activation)
      : problem_(problem), activation_(activation) {}

  // The block's elements, to be walked by rows_of(block); valid as long as scratch.
  const void* read(int64_t channel, const ChannelBlock& block, Scratch& scratch) const {
    if (in_place()) return address(channel, block);
    for_each_even_row(
        channel, block, [&](int64_t offset, int64_t stride, int64_t length, int64_t first) {
          loops(problem_.dtype).pack(at(offset), stride, length, packed(scratch, first));
        });
    return scratch.data();
  }

  // Where to put the block's elements; commit() moves them on.
  void* target(int64_t channel, const ChannelBlock& block, Scratch& scratch) const {
    return in_place() ? address(channel, block) : scratch.data();
  }
  void commit(int64_t channel, const ChannelBlock& block, Scratch& scratch) const {
    if (in_place()) return;
    for_each_even_row(
        channel, block, [&](int64_t offset, int64_t stride, int64_t length, int64_t first) {
          loops(problem_.dtype).unpack(packed(scratch, first), at(offset), stride, length);
        });
  }

  // Calls body(offset, i) for the block's elements: where in the activation, and the how manieth.
  template <typename Body>
  void for_each_element(int64_t channel, const ChannelBlock& block, const Body& body) const {
    for_each_even_row(channel, block,
                      [&](int64_t offset, int64_t stride, int64_t length, int64_t first) {
                        for (int64_t i = 0; i < length; ++i) body(offset + i * stride, first + i);
                      });
  }

 private:
  using Byte = std::conditional_t<std::is_const_v<Data>, const char, char>;

  bool in_place() const { return problem_.layout == Layout::kContiguous; }

  Byte* at(int64_t offset) const {
    return static_cast<Byte*>(activation_.data) + offset * element_size(problem_.dtype);
  }

  Byte* address(int64_t channel, const ChannelBlock& block) const {
    return at((block.sample * problem_.channels + channel) * problem_.spatial + block.position);
  }

  // The place in scratch of the block's i-th element.
  char* packed(Scratch& scratch, int64_t i) const {
    return static_cast<char*>(scratch.data()) + i * element_size(accumulate_dtype(problem_.dtype));
  }

  // Calls body(offset, stride, length, i) for each row of evenly spaced elements, of which the
  // first is the block's i-th.
  template <typename Body>
  void for_each_even_row(int64_t channel, const ChannelBlock& block, Body body) const {
    const int64_t first =
        block.sample * activation_.batch_stride + channel * activation_.channel_stride;
    if (activation_.spatial_dims == 0) {
      body(first, activation_.batch_stride, block.rows.rows, 0);
      return;
    }
    const int inner = activation_.spatial_dims - 1;
    const int64_t inner_size = activation_.sizes[inner];
    const int64_t inner_stride = activation_.strides[inner];
    int64_t i = 0;
    for (int64_t sample = 0; sample < block.rows.rows; ++sample) {
      const int64_t begin = first + sample * activation_.batch_stride;
      int64_t position = block.position;
      const int64_t end = block.position + block.rows.columns;
      while (position < end) {
        const int64_t column = position % inner_size;
        const int64_t length = std::min(inner_size - column, end - position);
        int64_t offset = begin + column * inner_stride;
        int64_t index = position / inner_size;
        for (int d = inner - 1; d >= 0; --d) {
          offset += index % activation_.sizes[d] * activation_.strides[d];
          index /= activation_.sizes[d];
        }
        body(offset, inner_stride, length, i);
        i += length;
        position += length;
      }
    }
  }

  const Problem& problem_;
  const Activation<Data>& activation_;
};

}  // namespace fastbn::cpu
