// SPDX-License-Identifier: BSD-3-Clause
//
// The loops of loops.h for one instruction set. Included by targets/*.cpp only.
//
// Sums are taken in acc_t over at most a block of elements (partition.h, channels_last.cpp), in
// several independent vectors, and leave as double. Which element meets which lane depends on
// shapes alone, so results depend neither on alignment nor on threads, and are the same every time.
#pragma once

#include <type_traits>

#include "../../core/moments.h"
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
// lanes of one with `fill` in the others, or a single element in all lanes.
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
};
struct VectorAt {
  int64_t i;
  template <typename scalar_t>
  Vector<acc_type<scalar_t>> operator()(const scalar_t* data) const {
    return load(data + i);
  }
  template <typename scalar_t, typename Fill>
  Vector<acc_type<scalar_t>> operator()(const scalar_t* data, Fill) const {
    return load(data + i);
  }
};
struct TailAt {
  int64_t i;
  int64_t count;
  template <typename scalar_t, typename Fill>
  Vector<acc_type<scalar_t>> operator()(const scalar_t* data, Fill fill) const {
    return keep_last<acc_type<scalar_t>>(count, load(data + i), fill);
  }
};
struct ElementAt {
  int64_t i;
  template <typename scalar_t>
  Vector<acc_type<scalar_t>> operator()(const scalar_t* data) const {
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

// Sums of deviations from a pivot give the moments in one sweep, as long as the pivot is within
// two standard deviations of the mean: that bounds what the subtraction cancels. The square of that
// distance, in variances.
constexpr int kMaxPivotDistance = 4;

template <typename scalar_t>
void moments(const void* x_data, Block2d block, double* mean, double* m2) {
  using acc_t = acc_type<scalar_t>;
  using V = Vector<acc_t>;
  constexpr int kWidth = kLanes<acc_t>;
  const scalar_t* x = as<scalar_t>(x_data);
  const double count = static_cast<double>(block.rows * block.columns);

  // First the mean of a few elements is the pivot: exact where all elements are the same. Where it
  // turns out to be far off, the mean it led to is the next and last.
  V pivot = load_one(x);
  if (block.columns >= kUnroll * kWidth) {
    Sum<acc_t> sample;
    for (int i = 0; i < kUnroll; ++i) sample.parts[i] = load(x + i * kWidth);
    pivot = splat(static_cast<acc_t>(sample.total() / (kUnroll * kWidth)));
  }
  for (bool last = false;; last = true) {
    Sum<acc_t> deviations, squares;
    for_each_vector<kWidth>(block, [&](int accumulator, auto at) {
      prefetch(x + at.i + kPrefetchBytes / sizeof(scalar_t), accumulator);
      const auto deviation = at(x, pivot) - pivot;
      deviations.add(accumulator, deviation);
      squares.add(accumulator, deviation * deviation);
    });
    const double shift = deviations.total() / count;
    const double squared_shift = shift * shift * count;
    *mean = pivot[0] + shift;
    *m2 = squares.total() - squared_shift;
    if (last || squared_shift <= kMaxPivotDistance * *m2) return;
    pivot = splat(static_cast<acc_t>(*mean));
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

// Writes value(at) to `length` elements of `out`, which must not overlap what `value` reads: where
// vectors overlap, elements are computed from the input again and written twice, which is cheaper
// than writing single ones.
template <LaneOrder kOrder, typename scalar_t, typename Body>
inline __attribute__((always_inline)) void map(scalar_t* out, int64_t length, bool stream,
                                               Body value) {
  constexpr int kWidth = kLanes<acc_type<scalar_t>>;
  constexpr int64_t kSize = sizeof(scalar_t);
  if (length < kWidth) {
    for (int64_t i = 0; i < length; ++i) store_one(out + i, value(ElementAt{i}));
    return;
  }
  int64_t i = 0;
  if (stream && length >= 4 * kWidth) {
    // Streaming stores want alignment; those of a pair of halves are as wide as a vector.
    const int64_t misaligned =
        reinterpret_cast<intptr_t>(out) % kVectorBytes<acc_type<scalar_t>> / kSize;
    if (misaligned != 0) {
      i = kVectorBytes<acc_type<scalar_t>> / kSize - misaligned;
      map_vectors<kOrder, false>(out, 0, i + kWidth, value);
    }
    i = map_vectors<kOrder, true>(out, i, length, value);
  }
  i = map_vectors<kOrder, false>(out, i, length, value);
  if (i < length) store<false>(out + length - kWidth, value(VectorAt{length - kWidth}));
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

// Sums of deviations from `pivot` and of their squares, per column.
template <typename scalar_t, typename acc_t>
void column_deviations(const scalar_t* x, const Block2d& block, const acc_t* pivot, acc_t* sum,
                       acc_t* square) {
  using V = Vector<acc_t>;
  constexpr int kWidth = kLanes<acc_t>;
  for_each_visit<kWidth>(block, [&](int64_t j, auto vectors, int64_t begin, int64_t end) {
    constexpr int kVectors = decltype(vectors)::value;
    V pivots[kVectors], sums[kVectors] = {}, squares[kVectors] = {};
    for (int v = 0; v < kVectors; ++v) {
      pivots[v] = load(pivot + j + v * kWidth);
      if (begin == 0) continue;
      sums[v] = load(sum + j + v * kWidth);
      squares[v] = load(square + j + v * kWidth);
    }
    for (int64_t row = begin; row < end; ++row) {
      const scalar_t* elements = x + row * block.row_stride + j;
      for (int v = 0; v < kVectors; ++v) {
        prefetch(elements + v * kWidth + kVisitRows * block.row_stride, v);
        const V deviation = load(elements + v * kWidth) - pivots[v];
        sums[v] += deviation;
        squares[v] += deviation * deviation;
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      store<false>(sum + j + v * kWidth, sums[v]);
      store<false>(square + j + v * kWidth, squares[v]);
    }
  });
}

template <typename scalar_t>
void column_moments(const void* x_data, Block2d block, int64_t count, double* mean, double* m2) {
  using acc_t = acc_type<scalar_t>;
  const scalar_t* x = as<scalar_t>(x_data);
  const acc_t inverse_rows = acc_t{1} / static_cast<acc_t>(block.rows);

  // As in moments(), of every column: mean = pivot + sum / rows.
  acc_t pivot[kMaxBlockColumns], sum[kMaxBlockColumns], square[kMaxBlockColumns];
  const int64_t sampled = block.rows < 4 ? 1 : 4;
  for (int64_t row = 0; row < sampled; ++row) {
    const scalar_t* elements = x + row * block.row_stride;
    map<LaneOrder::kMemory>(sum, block.columns, false, [&](auto at) { return at(elements); });
    for (int64_t j = 0; j < block.columns; ++j) pivot[j] = row == 0 ? sum[j] : pivot[j] + sum[j];
  }
  for (int64_t j = 0; j < block.columns; ++j) pivot[j] /= static_cast<acc_t>(sampled);
  for (bool last = false;; last = true) {
    column_deviations(x, block, pivot, sum, square);
    int far = 0;
    for (int64_t j = 0; j < block.columns; ++j) {
      const acc_t squared_shift = sum[j] * sum[j] * inverse_rows;
      far |= !(squared_shift <= kMaxPivotDistance * (square[j] - squared_shift));
    }
    if (last || !far) break;
    for (int64_t j = 0; j < block.columns; ++j) pivot[j] += sum[j] * inverse_rows;
  }

  const double rows = static_cast<double>(block.rows);
  const MergeWeights<double> weights = merge_weights(static_cast<double>(count), rows);
  for (int64_t j = 0; j < block.columns; ++j) {
    const double residual = static_cast<double>(sum[j]) / rows;
    merge_moments(weights, static_cast<double>(pivot[j]) + residual,
                  static_cast<double>(square[j]) - residual * residual * rows, mean[j], m2[j]);
  }
}

template <typename scalar_t>
void grad_sums(const void* dy_data, const void* x_data, Block2d block, double mean_value,
               double* sum_dy, double* sum_dy_xmu) {
  using acc_t = acc_type<scalar_t>;
  using V = Vector<acc_t>;
  const scalar_t* dy = as<scalar_t>(dy_data);
  const scalar_t* x = as<scalar_t>(x_data);
  const V mean = splat(static_cast<acc_t>(mean_value));
  Sum<acc_t> dys, products;
  for_each_vector<kLanes<acc_t>>(block, [&](int accumulator, auto at) {
    prefetch(dy + at.i + kPrefetchBytes / sizeof(scalar_t), accumulator);
    prefetch(x + at.i + kPrefetchBytes / sizeof(scalar_t), accumulator);
    const auto gradient = at(dy, V{});
    dys.add(accumulator, gradient);
    products.add(accumulator, gradient * (at(x, mean) - mean));
  });
  *sum_dy = dys.total();
  *sum_dy_xmu = products.total();
}

template <typename scalar_t>
void column_grad_sums(const void* dy_data, const void* x_data, Block2d block, const void* mean_data,
                      double* sum_dy, double* sum_dy_xmu) {
  using acc_t = acc_type<scalar_t>;
  using V = Vector<acc_t>;
  constexpr int kWidth = kLanes<acc_t>;
  const scalar_t* dy = as<scalar_t>(dy_data);
  const scalar_t* x = as<scalar_t>(x_data);
  const acc_t* mean = as<acc_t>(mean_data);

  acc_t block_dy[kMaxBlockColumns], block_product[kMaxBlockColumns];
  for_each_visit<kWidth>(block, [&](int64_t j, auto vectors, int64_t begin, int64_t end) {
    constexpr int kVectors = decltype(vectors)::value;
    V means[kVectors], dys[kVectors] = {}, products[kVectors] = {};
    for (int v = 0; v < kVectors; ++v) {
      means[v] = load(mean + j + v * kWidth);
      if (begin == 0) continue;
      dys[v] = load(block_dy + j + v * kWidth);
      products[v] = load(block_product + j + v * kWidth);
    }
    for (int64_t row = begin; row < end; ++row) {
      const int64_t first = row * block.row_stride + j;
      for (int v = 0; v < kVectors; ++v) {
        prefetch(dy + first + v * kWidth + kVisitRows * block.row_stride, v);
        prefetch(x + first + v * kWidth + kVisitRows * block.row_stride, v);
        const V gradient = load(dy + first + v * kWidth);
        dys[v] += gradient;
        products[v] += gradient * (load(x + first + v * kWidth) - means[v]);
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      store<false>(block_dy + j + v * kWidth, dys[v]);
      store<false>(block_product + j + v * kWidth, products[v]);
    }
  });
  for (int64_t j = 0; j < block.columns; ++j) {
    sum_dy[j] += static_cast<double>(block_dy[j]);
    sum_dy_xmu[j] += static_cast<double>(block_product[j]);
  }
}

template <typename scalar_t>
void normalize(const void* x_data, void* y_data, Block2d block, AffineColumns affine, int64_t step,
               bool stream) {
  using acc_t = acc_type<scalar_t>;
  for (int64_t row = 0; row < block.rows; ++row) {
    const auto mean = splat(as<acc_t>(affine.mean)[row * step]);
    const auto scale = splat(as<acc_t>(affine.scale)[row * step]);
    const auto shift = splat(as<acc_t>(affine.shift)[row * step]);
    const scalar_t* x = as<scalar_t>(x_data) + row * block.row_stride;
    scalar_t* y = as<scalar_t>(y_data) + row * block.row_stride;
    map<LaneOrder::kAny>(y, block.columns, stream,
                         [&](auto at) { return (at(x) - mean) * scale + shift; });
  }
  if (stream) stream_fence();
}

template <typename scalar_t>
void normalize_columns(const void* x_data, void* y_data, Block2d block, AffineColumns affine,
                       bool stream) {
  using acc_t = acc_type<scalar_t>;
  const acc_t* mean = as<acc_t>(affine.mean);
  const acc_t* scale = as<acc_t>(affine.scale);
  const acc_t* shift = as<acc_t>(affine.shift);
  for (int64_t row = 0; row < block.rows; ++row) {
    const scalar_t* x = as<scalar_t>(x_data) + row * block.row_stride;
    scalar_t* y = as<scalar_t>(y_data) + row * block.row_stride;
    map<LaneOrder::kMemory>(y, block.columns, stream,
                            [&](auto at) { return (at(x) - at(mean)) * at(scale) + at(shift); });
  }
  if (stream) stream_fence();
}

template <typename scalar_t>
void grad_input(const void* dy_data, const void* x_data, void* dx_data, Block2d block,
                GradAffineColumns affine, int64_t step, bool stream) {
  using acc_t = acc_type<scalar_t>;
  for (int64_t row = 0; row < block.rows; ++row) {
    const auto mean = splat(as<acc_t>(affine.mean)[row * step]);
    const auto scale = splat(as<acc_t>(affine.scale)[row * step]);
    const auto slope = splat(as<acc_t>(affine.slope)[row * step]);
    const auto offset = splat(as<acc_t>(affine.offset)[row * step]);
    const int64_t first = row * block.row_stride;
    const scalar_t* dy = as<scalar_t>(dy_data) + first;
    const scalar_t* x = as<scalar_t>(x_data) + first;
    map<LaneOrder::kAny>(as<scalar_t>(dx_data) + first, block.columns, stream, [&](auto at) {
      return at(dy) * scale + ((at(x) - mean) * slope + offset);
    });
  }
  if (stream) stream_fence();
}

template <typename scalar_t>
void grad_input_columns(const void* dy_data, const void* x_data, void* dx_data, Block2d block,
                        GradAffineColumns affine, bool stream) {
  using acc_t = acc_type<scalar_t>;
  const acc_t* mean = as<acc_t>(affine.mean);
  const acc_t* scale = as<acc_t>(affine.scale);
  const acc_t* slope = as<acc_t>(affine.slope);
  const acc_t* offset = as<acc_t>(affine.offset);
  for (int64_t row = 0; row < block.rows; ++row) {
    const int64_t first = row * block.row_stride;
    const scalar_t* dy = as<scalar_t>(dy_data) + first;
    const scalar_t* x = as<scalar_t>(x_data) + first;
    map<LaneOrder::kMemory>(as<scalar_t>(dx_data) + first, block.columns, stream, [&](auto at) {
      return at(dy) * at(scale) + ((at(x) - at(mean)) * at(slope) + at(offset));
    });
  }
  if (stream) stream_fence();
}

template <typename scalar_t>
void pack(const void* from_data, int64_t stride, int64_t length, void* to_data) {
  const scalar_t* from = as<scalar_t>(from_data);
  acc_type<scalar_t>* to = as<acc_type<scalar_t>>(to_data);
  if (stride == 1) {
    map<LaneOrder::kMemory>(to, length, false, [&](auto at) { return at(from); });
  } else {
    for (int64_t i = 0; i < length; ++i) store_one(to + i, load_one(from + i * stride));
  }
}

template <typename scalar_t>
void unpack(const void* from_data, void* to_data, int64_t stride, int64_t length) {
  const acc_type<scalar_t>* from = as<acc_type<scalar_t>>(from_data);
  scalar_t* to = as<scalar_t>(to_data);
  if (stride == 1) {
    map<LaneOrder::kMemory>(to, length, false, [&](auto at) { return at(from); });
  } else {
    for (int64_t i = 0; i < length; ++i) store_one(to + i * stride, load_one(from + i));
  }
}

template <typename scalar_t>
constexpr Loops make_loops() {
  return {moments<scalar_t>,    column_moments<scalar_t>,
          grad_sums<scalar_t>,  column_grad_sums<scalar_t>,
          normalize<scalar_t>,  normalize_columns<scalar_t>,
          grad_input<scalar_t>, grad_input_columns<scalar_t>,
          pack<scalar_t>,       unpack<scalar_t>};
}

const Loops& loops(DType dtype) {
  static constexpr Loops kFloat64 = make_loops<double>();
  static constexpr Loops kFloat32 = make_loops<float>();
  static constexpr Loops kBFloat16 = make_loops<BFloat16>();
  static constexpr Loops kFloat16 = make_loops<Float16>();
  switch (dtype) {
    case DType::kFloat64:
      return kFloat64;
    case DType::kFloat32:
      return kFloat32;
    case DType::kBFloat16:
      return kBFloat16;
    default:
      return kFloat16;
  }
}

}  // namespace fastbn::cpu::FASTBN_CAPABILITY
