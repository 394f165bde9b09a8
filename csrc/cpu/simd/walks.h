// SPDX-License-Identifier: BSD-3-Clause
//
// How loops walk blocks and rows: all elements, vector by vector, in an order that depends on
// shapes alone. Part of loops_impl.h.
#pragma once

#include <type_traits>

#include "vectors.h"

namespace fastbn::cpu::FASTBN_CAPABILITY {

// Independent accumulators that hide the latency of an add.
constexpr int kUnroll = 4;

template <typename scalar_t>
inline const scalar_t* as(const void* data) {
  return static_cast<const scalar_t*>(data);
}
template <typename scalar_t>
inline scalar_t* as(void* data) {
  return static_cast<scalar_t*>(data);
}

template <typename acc_t>
struct Sum {
  Vector<acc_t> parts[kUnroll] = {};

  void add(int accumulator, Vector<acc_t> value) { parts[accumulator] += value; }
  void add(int accumulator, Pair<acc_t> value) {
    parts[accumulator] += value.first;
    parts[accumulator + 1] += value.second;
  }

  double total() const {
    return FASTBN_CAPABILITY::total<acc_t>((parts[0] + parts[1]) + (parts[2] + parts[3]));
  }
};

// Asks for what a sweep will read shortly; the processor's own prefetching runs less far ahead.
// Once per cache line: `vector` counts the vectors of an unrolled step.
template <typename scalar_t>
inline __attribute__((always_inline)) void prefetch(const scalar_t* next, int vector) {
  constexpr int kBytes = kLanes<acc_type<scalar_t>> * static_cast<int>(sizeof(scalar_t));
  if (vector * kBytes % 64 == 0) __builtin_prefetch(next, 0, 2);
}
constexpr int kPrefetchBytes = 1024;

// Positions in a block or row, and how to load what is there: a pair of vectors, a vector, the last
// lanes of one with `fill` in the others, or a single element in all lanes. whole() loads a vector
// of which only some lanes may count, kept() fills the others with zeros, and put() stores all;
// mask() and put_mask() do so with a mask.
template <LaneOrder kOrder>
struct PairAt {
  int64_t i;
  template <typename scalar_t>
  Pair<acc_type<scalar_t>> operator()(const scalar_t* data) const {
    return load_pair<kOrder>(data + i);
  }
  template <typename scalar_t, typename Fill>
  Pair<acc_type<scalar_t>> operator()(const scalar_t* data, Fill) const {
    return (*this)(data);
  }
  template <typename scalar_t>
  Pair<acc_type<scalar_t>> whole(const scalar_t* data) const {
    return (*this)(data);
  }
  template <typename acc_t>
  Pair<acc_t> kept(Pair<acc_t> value) const {
    return value;
  }
  template <typename scalar_t>
  void put(scalar_t* data, Pair<acc_type<scalar_t>> value) const {
    store_pair<kOrder, false>(data + i, value);
  }
  template <typename scalar_t>
  PairMask<acc_type<scalar_t>> mask(const uint8_t* bits) const {
    return load_pair_mask<kOrder, scalar_t>(bits, i);
  }
  template <typename scalar_t>
  void put_mask(uint8_t* bits, PairMask<acc_type<scalar_t>> lanes) const {
    static_assert(kOrder == LaneOrder::kMemory);
    using acc_t = acc_type<scalar_t>;
    store_mask<scalar_t>(bits, i, bits_of<acc_t>(lanes.first));
    store_mask<scalar_t>(bits, i + kLanes<acc_t>, bits_of<acc_t>(lanes.second));
  }
};
struct VectorAt {
  int64_t i;
  template <typename scalar_t>
  LaneMask<acc_type<scalar_t>> mask(const uint8_t* bits) const {
    return lanes_of<acc_type<scalar_t>>(load_mask<scalar_t>(bits, i));
  }
  template <typename scalar_t>
  void put_mask(uint8_t* bits, LaneMask<acc_type<scalar_t>> lanes) const {
    store_mask<scalar_t>(bits, i, bits_of<acc_type<scalar_t>>(lanes));
  }
  template <typename scalar_t>
  Vector<acc_type<scalar_t>> operator()(const scalar_t* data) const {
    return load(data + i);
  }
  template <typename scalar_t, typename Fill>
  Vector<acc_type<scalar_t>> operator()(const scalar_t* data, Fill) const {
    return load(data + i);
  }
  template <typename scalar_t>
  Vector<acc_type<scalar_t>> whole(const scalar_t* data) const {
    return load(data + i);
  }
  template <typename V>
  V kept(V value) const {
    return value;
  }
  template <typename scalar_t>
  void put(scalar_t* data, Vector<acc_type<scalar_t>> value) const {
    store<false>(data + i, value);
  }
};
struct TailAt {
  int64_t i;
  int64_t count;
  template <typename scalar_t>
  LaneMask<acc_type<scalar_t>> mask(const uint8_t* bits) const {
    return lanes_of<acc_type<scalar_t>>(load_mask<scalar_t>(bits, i));
  }
  template <typename scalar_t, typename Fill>
  Vector<acc_type<scalar_t>> operator()(const scalar_t* data, Fill fill) const {
    return keep_last<acc_type<scalar_t>>(count, load(data + i), fill);
  }
  template <typename scalar_t>
  Vector<acc_type<scalar_t>> whole(const scalar_t* data) const {
    return load(data + i);
  }
  template <typename V>
  V kept(V value) const {
    return keep_last<std::decay_t<decltype(value[0])>>(count, value, V{});
  }
  template <typename scalar_t>
  void put(scalar_t* data, Vector<acc_type<scalar_t>> value) const {
    store<false>(data + i, value);
  }
};
struct ElementAt {
  int64_t i;
  template <typename scalar_t>
  void put_mask(uint8_t* bits, LaneMask<acc_type<scalar_t>> lanes) const {
    store_mask<scalar_t, 1>(bits, i, lanes[0] & 1u);
  }
  template <typename scalar_t>
  Vector<acc_type<scalar_t>> operator()(const scalar_t* data) const {
    return load_one(data + i);
  }
  template <typename scalar_t>
  Vector<acc_type<scalar_t>> whole(const scalar_t* data) const {
    return load_one(data + i);
  }
};

// Calls body(accumulator, at) for all elements of a block; `accumulator` is the first to use.
template <int kWidth, typename Body>
inline __attribute__((always_inline)) void for_each_vector(Block2d block, Body body) {
  for (int64_t row = 0; row < block.rows; ++row) {
    const int64_t first = row * block.row_stride;
    int64_t i = 0;
    for (; i + kUnroll * kWidth <= block.columns; i += kUnroll * kWidth) {
#pragma GCC unroll 2
      for (int accumulator = 0; accumulator < kUnroll; accumulator += 2) {
        body(accumulator, PairAt<LaneOrder::kAny>{first + i + accumulator * kWidth});
      }
    }
    for (; i + kWidth <= block.columns; i += kWidth) body(0, VectorAt{first + i});
    if (i < block.columns) body(1, TailAt{first + block.columns - kWidth, block.columns - i});
  }
}

// Whole vectors of [i, length), as many as there are; returns where they end.
template <LaneOrder kOrder, bool kStream, typename scalar_t, typename Body>
inline __attribute__((always_inline)) int64_t map_vectors(scalar_t* out, int64_t i, int64_t length,
                                                          Body value) {
  constexpr int kWidth = kLanes<acc_type<scalar_t>>;
  for (; i + 2 * kWidth <= length; i += 2 * kWidth) {
    // A cache line that stores only complete has to be in cache first.
    if (!kStream) __builtin_prefetch(out + i + kPrefetchBytes / sizeof(scalar_t), 1, 2);
    store_pair<kOrder, kStream>(out + i, value(PairAt<kOrder>{i}));
  }
  for (; !kStream && i + kWidth <= length; i += kWidth) store<false>(out + i, value(VectorAt{i}));
  return i;
}

// Writes value(at) to `length` elements of `out`. What `value` reads may be `out` itself, unless
// with `stream`, but must not overlap it in another way: where vectors overlap, elements are
// computed from the input again and written twice, which is cheaper than writing single ones.
template <LaneOrder kOrder, typename scalar_t, typename Body>
inline __attribute__((always_inline)) void map(scalar_t* out, int64_t length, bool stream,
                                               Body value) {
  using acc_t = acc_type<scalar_t>;
  constexpr int kWidth = kLanes<acc_t>;
  constexpr int64_t kSize = sizeof(scalar_t);
  if (length < kWidth) {
    for (int64_t i = 0; i < length; ++i) store_one(out + i, value(ElementAt{i}));
    return;
  }
  // The last vector, before its neighbor is written.
  const VectorAt last{length - kWidth};
  const bool overlaps = length % kWidth != 0 || stream;
  const Vector<acc_t> last_value = overlaps ? value(last) : Vector<acc_t>{};
  int64_t i = 0;
  if (stream && length >= 4 * kWidth) {
    // Streaming stores want alignment; those of a pair of halves are as wide as a vector.
    const int64_t misaligned = reinterpret_cast<intptr_t>(out) % kVectorBytes<acc_t> / kSize;
    if (misaligned != 0) {
      i = kVectorBytes<acc_t> / kSize - misaligned;
      map_vectors<kOrder, false>(out, 0, i + kWidth, value);
    }
    i = map_vectors<kOrder, true>(out, i, length, value);
  }
  i = map_vectors<kOrder, false>(out, i, length, value);
  if (i < length) store<false>(out + last.i, last_value);
}

constexpr int64_t kVisitRows = 8;

// Sweeps a block in visits of a few rows by a few vectors, for which visit(j, vectors, begin, end)
// adds rows [begin, end) of `vectors` vectors from column j on to its sums; they start with row 0.
// Few rows, so that memory is read almost in order. Columns that do not fill a vector are left for
// last, in one that overlaps its neighbor and computes the same again.
template <int kWidth, typename Visit>
inline __attribute__((always_inline)) void for_each_visit(const Block2d& block, Visit visit) {
  constexpr std::integral_constant<int, kUnroll> kFull;
  constexpr std::integral_constant<int, 1> kSingle;
  for (int64_t begin = 0; begin < block.rows; begin += kVisitRows) {
    const int64_t end = begin + kVisitRows < block.rows ? begin + kVisitRows : block.rows;
    int64_t j = 0;
    for (; j + kUnroll * kWidth <= block.columns; j += kUnroll * kWidth)
      visit(j, kFull, begin, end);
    for (; j + kWidth <= block.columns; j += kWidth) visit(j, kSingle, begin, end);
  }
  if (block.columns % kWidth != 0) visit(block.columns - kWidth, kSingle, 0, block.rows);
}

}  // namespace fastbn::cpu::FASTBN_CAPABILITY
