// SPDX-License-Identifier: BSD-3-Clause
//
// The loops of loops.h for one instruction set. Included by loops_*.cpp only.
//
// Sums are taken in acc over at most a block of elements (schedule.h), in several independent
// vectors, and leave as double. Which element meets which lane depends on shapes alone, so results
// do not depend on alignment, on threads or on the run.
#pragma once

#include <type_traits>

#include "simd.h"

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

  double total() const {
    return FASTBN_CAPABILITY::total<acc_t>((parts[0] + parts[1]) + (parts[2] + parts[3]));
  }
};

// Brings the cache line at `from`, if any, close while something else is computed. Of the unrolled
// vectors those ask that begin a line.
template <typename scalar_t>
inline __attribute__((always_inline)) void prefetch(const scalar_t* from, int slot, int64_t i) {
  constexpr int kBytes = kLanes<acc_type<scalar_t>> * static_cast<int>(sizeof(scalar_t));
  if (slot * kBytes % 64 == 0) __builtin_prefetch(from + i, 0, 2);
}

// Calls body(slot, offset, tail) for every vector of a run: slot is the accumulator to use, offset
// the vector's first element, and tail, where not zero, how many of its last lanes are new.
template <int kWidth, typename Body>
inline __attribute__((always_inline)) void for_each_vector(Run run, Body body) {
  for (int64_t segment = 0; segment < run.segments; ++segment) {
    const int64_t first = segment * run.segment_stride;
    int64_t i = 0;
    for (; i + kUnroll * kWidth <= run.length; i += kUnroll * kWidth) {
#pragma GCC unroll 4
      for (int slot = 0; slot < kUnroll; ++slot) body(slot, first + i + slot * kWidth, 0);
    }
    for (; i + kWidth <= run.length; i += kWidth) body(0, first + i, 0);
    if (i < run.length) body(1, first + run.length - kWidth, run.length - i);
  }
}

template <typename scalar_t>
void moments(const void* x_data, Run run, const void* next_data, double* mean, double* m2) {
  using acc_t = acc_type<scalar_t>;
  using V = Vector<acc_t>;
  constexpr int kWidth = kLanes<acc_t>;
  const scalar_t* x = as<scalar_t>(x_data);
  const scalar_t* next = as<scalar_t>(next_data);
  const double count = static_cast<double>(run.segments * run.length);

  // Deviations from one of the elements, so that a constant run has exactly its value as the mean.
  const V pivot = load_one(x);
  Sum<acc_t> around_pivot;
  for_each_vector<kWidth>(run, [&](int slot, int64_t i, int64_t tail) {
    V value = load(x + i);
    if (tail) value = keep_last<acc_t>(tail, value, pivot);
    around_pivot.parts[slot] += value - pivot;
  });
  const V center = splat(static_cast<acc_t>(pivot[0] + around_pivot.total() / count));

  // The sum of deviations from the rounded mean corrects what rounding left out of both results.
  Sum<acc_t> deviations, squares;
  for_each_vector<kWidth>(run, [&](int slot, int64_t i, int64_t tail) {
    prefetch(next, slot, i);
    V value = load(x + i);
    if (tail) value = keep_last<acc_t>(tail, value, center);
    const V deviation = value - center;
    deviations.parts[slot] += deviation;
    squares.parts[slot] += deviation * deviation;
  });
  const double residual = deviations.total() / count;
  *mean = center[0] + residual;
  *m2 = squares.total() - residual * residual * count;
}

// Calls body.template operator()<vectors>(first column) for strips that cover the columns; the
// last one overlaps its neighbour where the columns are not a multiple of the vector.
template <int kWidth, typename Body>
inline __attribute__((always_inline)) void for_each_strip(int64_t columns, Body body) {
  int64_t j = 0;
  for (; j + kUnroll * kWidth <= columns; j += kUnroll * kWidth) {
    body(j, std::integral_constant<int, kUnroll>());
  }
  for (; j + kWidth <= columns; j += kWidth) body(j, std::integral_constant<int, 1>());
  if (j < columns) body(columns - kWidth, std::integral_constant<int, 1>());
}

template <typename scalar_t>
void column_moments(const void* x_data, Tile tile, const void* next_data, int64_t count,
                    double* mean, double* m2) {
  using acc_t = acc_type<scalar_t>;
  using V = Vector<acc_t>;
  constexpr int kWidth = kLanes<acc_t>;
  const scalar_t* x = as<scalar_t>(x_data);
  const scalar_t* next = as<scalar_t>(next_data);

  // Moments of this tile: mean = center + deviation / rows.
  acc_t center[kMaxTileColumns], deviation[kMaxTileColumns], square[kMaxTileColumns];
  for_each_strip<kWidth>(tile.columns, [&](int64_t j, auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    V pivots[kVectors], sums[kVectors] = {}, squares[kVectors] = {};
    for (int v = 0; v < kVectors; ++v) pivots[v] = load(x + j + v * kWidth);
    for (int64_t row = 1; row < tile.rows; ++row) {
      const scalar_t* elements = x + row * tile.row_stride + j;
      for (int v = 0; v < kVectors; ++v) sums[v] += load(elements + v * kWidth) - pivots[v];
    }
    for (int v = 0; v < kVectors; ++v) {
      pivots[v] += sums[v] / static_cast<acc_t>(tile.rows);
      sums[v] = V{};
    }
    for (int64_t row = 0; row < tile.rows; ++row) {
      const scalar_t* elements = x + row * tile.row_stride + j;
      for (int v = 0; v < kVectors; ++v) {
        prefetch(next, v, row * tile.row_stride + j + v * kWidth);
        const V difference = load(elements + v * kWidth) - pivots[v];
        sums[v] += difference;
        squares[v] += difference * difference;
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      store<false>(center + j + v * kWidth, pivots[v]);
      store<false>(deviation + j + v * kWidth, sums[v]);
      store<false>(square + j + v * kWidth, squares[v]);
    }
  });

  const double rows = static_cast<double>(tile.rows);
  const double share = rows / static_cast<double>(count + tile.rows);
  const double weight = share * static_cast<double>(count);
  for (int64_t j = 0; j < tile.columns; ++j) {
    const double residual = static_cast<double>(deviation[j]) / rows;
    const double delta = static_cast<double>(center[j]) + residual - mean[j];
    mean[j] += delta * share;
    m2[j] += (static_cast<double>(square[j]) - residual * residual * rows) + delta * delta * weight;
  }
}

template <typename scalar_t>
void grad_sums(const void* dy_data, const void* x_data, Run run, const void* next_dy_data,
               const void* next_x_data, double mean_value, double* sum_dy, double* sum_dy_xmu) {
  using acc_t = acc_type<scalar_t>;
  using V = Vector<acc_t>;
  const scalar_t* dy = as<scalar_t>(dy_data);
  const scalar_t* x = as<scalar_t>(x_data);
  const scalar_t* next_dy = as<scalar_t>(next_dy_data);
  const scalar_t* next_x = as<scalar_t>(next_x_data);
  const V mean = splat(static_cast<acc_t>(mean_value));
  Sum<acc_t> dys, products;
  for_each_vector<kLanes<acc_t>>(run, [&](int slot, int64_t i, int64_t tail) {
    prefetch(next_dy, slot, i);
    prefetch(next_x, slot, i);
    V gradient = load(dy + i);
    V deviation = load(x + i) - mean;
    if (tail) {
      gradient = keep_last<acc_t>(tail, gradient, V{});
      deviation = keep_last<acc_t>(tail, deviation, V{});
    }
    dys.parts[slot] += gradient;
    products.parts[slot] += gradient * deviation;
  });
  *sum_dy = dys.total();
  *sum_dy_xmu = products.total();
}

template <typename scalar_t>
void column_grad_sums(const void* dy_data, const void* x_data, Tile tile, const void* next_dy_data,
                      const void* next_x_data, const void* mean_data, double* sum_dy,
                      double* sum_dy_xmu) {
  using acc_t = acc_type<scalar_t>;
  using V = Vector<acc_t>;
  constexpr int kWidth = kLanes<acc_t>;
  const scalar_t* dy = as<scalar_t>(dy_data);
  const scalar_t* x = as<scalar_t>(x_data);
  const scalar_t* next_dy = as<scalar_t>(next_dy_data);
  const scalar_t* next_x = as<scalar_t>(next_x_data);
  const acc_t* mean = as<acc_t>(mean_data);

  acc_t tile_dy[kMaxTileColumns], tile_product[kMaxTileColumns];
  for_each_strip<kWidth>(tile.columns, [&](int64_t j, auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    V means[kVectors], dys[kVectors] = {}, products[kVectors] = {};
    for (int v = 0; v < kVectors; ++v) means[v] = load(mean + j + v * kWidth);
    for (int64_t row = 0; row < tile.rows; ++row) {
      const int64_t first = row * tile.row_stride + j;
      for (int v = 0; v < kVectors; ++v) {
        prefetch(next_dy, v, first + v * kWidth);
        prefetch(next_x, v, first + v * kWidth);
        const V gradient = load(dy + first + v * kWidth);
        dys[v] += gradient;
        products[v] += gradient * (load(x + first + v * kWidth) - means[v]);
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      store<false>(tile_dy + j + v * kWidth, dys[v]);
      store<false>(tile_product + j + v * kWidth, products[v]);
    }
  });
  for (int64_t j = 0; j < tile.columns; ++j) {
    sum_dy[j] += static_cast<double>(tile_dy[j]);
    sum_dy_xmu[j] += static_cast<double>(tile_product[j]);
  }
}

// Whole vectors of [i, length), as many as there are; returns where they end.
template <bool kStream, typename scalar_t, typename Body>
inline __attribute__((always_inline)) int64_t map_vectors(scalar_t* out, int64_t i, int64_t length,
                                                          Body vector_at) {
  constexpr int kWidth = kLanes<acc_type<scalar_t>>;
  constexpr std::true_type kWhole;
  for (; i + 2 * kWidth <= length; i += 2 * kWidth) {
    store_pair<kStream>(out + i, vector_at(i, kWhole), vector_at(i + kWidth, kWhole));
  }
  for (; !kStream && i + kWidth <= length; i += kWidth) store<false>(out + i, vector_at(i, kWhole));
  return i;
}

// Writes vector_at(i, whole) to `length` elements of `out`; `whole` says whether a vector is there
// to be read at i, or just an element. Overlapping vectors write the same values twice, which is
// cheaper than single elements.
template <typename scalar_t, typename Body>
inline __attribute__((always_inline)) void map(scalar_t* out, int64_t length, bool stream,
                                               Body vector_at) {
  constexpr int kWidth = kLanes<acc_type<scalar_t>>;
  constexpr int64_t kSize = sizeof(scalar_t);
  constexpr std::true_type kWhole;
  if (length < kWidth) {
    for (int64_t i = 0; i < length; ++i) store_one(out + i, vector_at(i, std::false_type()));
    return;
  }
  int64_t i = 0;
  if (stream && length >= 4 * kWidth) {
    // Streaming stores want alignment; those of a pair of halves are as wide as a vector.
    const int64_t misaligned = reinterpret_cast<intptr_t>(out) % kVectorBytes / kSize;
    if (misaligned != 0) {
      i = kVectorBytes / kSize - misaligned;
      map_vectors<false>(out, 0, i + kWidth, vector_at);
    }
    i = map_vectors<true>(out, i, length, vector_at);
  }
  i = map_vectors<false>(out, i, length, vector_at);
  if (i < length) store<false>(out + length - kWidth, vector_at(length - kWidth, kWhole));
}

// A vector at full width, or its first element alone where fewer elements are left than lanes.
template <typename scalar_t>
inline Vector<acc_type<scalar_t>> load_as(const scalar_t* from, std::true_type) {
  return load(from);
}
template <typename scalar_t>
inline Vector<acc_type<scalar_t>> load_as(const scalar_t* from, std::false_type) {
  return load_one(from);
}

template <typename scalar_t>
void normalize(const void* x_data, void* y_data, Run run, Affine affine, bool stream) {
  using acc_t = acc_type<scalar_t>;
  using V = Vector<acc_t>;
  const V mean = splat(static_cast<acc_t>(affine.mean));
  const V scale = splat(static_cast<acc_t>(affine.scale));
  const V shift = splat(static_cast<acc_t>(affine.shift));
  for (int64_t segment = 0; segment < run.segments; ++segment) {
    const scalar_t* x = as<scalar_t>(x_data) + segment * run.segment_stride;
    scalar_t* y = as<scalar_t>(y_data) + segment * run.segment_stride;
    map(y, run.length, stream,
        [&](int64_t i, auto whole) -> V { return (load_as(x + i, whole) - mean) * scale + shift; });
  }
  if (stream) stream_fence();
}

template <typename scalar_t>
void normalize_columns(const void* x_data, void* y_data, Tile tile, AffineColumns affine,
                       bool stream) {
  using acc_t = acc_type<scalar_t>;
  using V = Vector<acc_t>;
  const acc_t* mean = as<acc_t>(affine.mean);
  const acc_t* scale = as<acc_t>(affine.scale);
  const acc_t* shift = as<acc_t>(affine.shift);
  for (int64_t row = 0; row < tile.rows; ++row) {
    const scalar_t* x = as<scalar_t>(x_data) + row * tile.row_stride;
    scalar_t* y = as<scalar_t>(y_data) + row * tile.row_stride;
    map(y, tile.columns, stream, [&](int64_t j, auto whole) -> V {
      return (load_as(x + j, whole) - load_as(mean + j, whole)) * load_as(scale + j, whole) +
             load_as(shift + j, whole);
    });
  }
  if (stream) stream_fence();
}

template <typename scalar_t>
void grad_input(const void* dy_data, const void* x_data, void* dx_data, Run run, GradAffine affine,
                bool stream) {
  using acc_t = acc_type<scalar_t>;
  using V = Vector<acc_t>;
  const V mean = splat(static_cast<acc_t>(affine.mean));
  const V scale = splat(static_cast<acc_t>(affine.scale));
  const V slope = splat(static_cast<acc_t>(affine.slope));
  const V offset = splat(static_cast<acc_t>(affine.offset));
  for (int64_t segment = 0; segment < run.segments; ++segment) {
    const int64_t first = segment * run.segment_stride;
    const scalar_t* dy = as<scalar_t>(dy_data) + first;
    const scalar_t* x = as<scalar_t>(x_data) + first;
    map(as<scalar_t>(dx_data) + first, run.length, stream, [&](int64_t i, auto whole) -> V {
      return load_as(dy + i, whole) * scale + ((load_as(x + i, whole) - mean) * slope + offset);
    });
  }
  if (stream) stream_fence();
}

template <typename scalar_t>
void grad_input_columns(const void* dy_data, const void* x_data, void* dx_data, Tile tile,
                        GradAffineColumns affine, bool stream) {
  using acc_t = acc_type<scalar_t>;
  using V = Vector<acc_t>;
  const acc_t* mean = as<acc_t>(affine.mean);
  const acc_t* scale = as<acc_t>(affine.scale);
  const acc_t* slope = as<acc_t>(affine.slope);
  const acc_t* offset = as<acc_t>(affine.offset);
  for (int64_t row = 0; row < tile.rows; ++row) {
    const int64_t first = row * tile.row_stride;
    const scalar_t* dy = as<scalar_t>(dy_data) + first;
    const scalar_t* x = as<scalar_t>(x_data) + first;
    map(as<scalar_t>(dx_data) + first, tile.columns, stream, [&](int64_t j, auto whole) -> V {
      const V deviation = load_as(x + j, whole) - load_as(mean + j, whole);
      return load_as(dy + j, whole) * load_as(scale + j, whole) +
             (deviation * load_as(slope + j, whole) + load_as(offset + j, whole));
    });
  }
  if (stream) stream_fence();
}

template <typename scalar_t>
void gather(const void* from_data, int64_t stride, int64_t length, void* to_data) {
  using acc_t = acc_type<scalar_t>;
  const scalar_t* from = as<scalar_t>(from_data);
  acc_t* to = as<acc_t>(to_data);
  if (stride == 1) {
    map(to, length, false, [&](int64_t i, auto whole) { return load_as(from + i, whole); });
  } else {
    for (int64_t i = 0; i < length; ++i) store_one(to + i, load_one(from + i * stride));
  }
}

template <typename scalar_t>
void scatter(const void* from_data, void* to_data, int64_t stride, int64_t length) {
  const acc_type<scalar_t>* from = as<acc_type<scalar_t>>(from_data);
  scalar_t* to = as<scalar_t>(to_data);
  if (stride == 1) {
    map(to, length, false, [&](int64_t i, auto whole) { return load_as(from + i, whole); });
  } else {
    for (int64_t i = 0; i < length; ++i) store_one(to + i * stride, load_one(from + i));
  }
}

template <typename scalar_t>
constexpr Loops make_loops() {
  return {moments<scalar_t>,          column_moments<scalar_t>,     grad_sums<scalar_t>,
          column_grad_sums<scalar_t>, normalize<scalar_t>,          normalize_columns<scalar_t>,
          grad_input<scalar_t>,       grad_input_columns<scalar_t>, gather<scalar_t>,
          scatter<scalar_t>};
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
