// SPDX-License-Identifier: BSD-3-Clause
//
// The loops of loops.h for one instruction set. Included by targets/*.cpp only.
//
// Sums are taken in acc_t over at most a block of elements (partition.h, channels_last.cpp), in
// several independent vectors, and leave as double. Which element meets which lane depends on
// shapes alone, so results depend neither on alignment nor on threads, and are the same every time.
#pragma once

#include "../../core/moments.h"
#include "epilogue_loops.h"
#include "vectors.h"
#include "walks.h"

namespace fastbn::cpu::FASTBN_CAPABILITY {

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
  return {moments<scalar_t>,
          column_moments<scalar_t>,
          grad_sums<scalar_t>,
          column_grad_sums<scalar_t>,
          normalize<scalar_t>,
          normalize_columns<scalar_t>,
          grad_input<scalar_t>,
          grad_input_columns<scalar_t>,
          activate<scalar_t>,
          activate_columns<scalar_t>,
          activated_grad_sums<scalar_t>,
          activated_column_grad_sums<scalar_t>,
          relu_grad_input<scalar_t>,
          relu_grad_input_columns<scalar_t>,
          activation_grad_columns<scalar_t>,
          pack<scalar_t>,
          unpack<scalar_t>};
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
