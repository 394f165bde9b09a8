// SPDX-License-Identifier: BSD-3-Clause
//
// Mapping::kMatrixColumns. The activation is a matrix of rows one after another in memory, each
// column of which belongs to one channel. A thread has a vector of adjacent columns and keeps a
// statistic for each; adjacent threads have adjacent vectors, and so on over the rows of a split.
//
//   channels last      a row is a position, a column a channel
//   folded             a row is several positions, so that it is a whole number of vectors
//   small segments     a row is a contiguous sample, and each channel has as many columns as
//                      positions; a channel tile is so many channels that it is a whole number of
//                      vectors
#pragma once

#include "mapping.cuh"

namespace fastbn::cuda {

template <typename scalar_t_, int kWidth>
class MatrixColumns {
 public:
  using scalar_t = scalar_t_;
  using acc_t = acc_type<scalar_t>;
  static constexpr int kLanes = kWidth;
  static constexpr bool kPersistent = kWidth * sizeof(scalar_t) == kVectorBytes;
  static constexpr bool kHasBoxes = true;
  static constexpr Occupancy kOccupancy = kMatrixColumnsOccupancy;

  // Keeps references: parameters of the kernel cost no registers.
  FASTBN_DEVICE MatrixColumns(const Problem& problem, const Geometry& geometry, int channel_tile,
                              int split)
      : problem_(problem),
        geometry_(geometry),
        channel_tile_(channel_tile),
        split_(split),
        row_(gpu::thread_index() / geometry.vectors),
        vector_(gpu::thread_index() % geometry.vectors) {}

  FASTBN_DEVICE int split() const { return split_; }
  FASTBN_DEVICE int channel_tile() const { return channel_tile_; }
  FASTBN_DEVICE int64_t first_channel() const {
    return int64_t{channel_tile_} * geometry_.tile_channels;
  }
  FASTBN_DEVICE int channels() const {
    const int64_t left = problem_.channels - first_channel();
    return left < geometry_.tile_channels ? static_cast<int>(left) : geometry_.tile_channels;
  }

  FASTBN_DEVICE int rows() const { return geometry_.thread_step.rows; }
  FASTBN_DEVICE int row() const { return row_; }
  FASTBN_DEVICE int vectors() const { return geometry_.vectors; }
  FASTBN_DEVICE int vector() const { return vector_; }

  FASTBN_DEVICE bool active() const {
    return row_ < rows() && first_vector() + vector_ < geometry_.row_vectors;
  }

  // Divides once: the next lane's column is the next of the same channel, or of the next one.
  template <typename Take>
  FASTBN_DEVICE void for_each_lane(const Take& take) const {
    const bool interleaved = geometry_.channel_step == 1;
    const int period = interleaved ? geometry_.tile_channels : geometry_.channel_step;
    int rounds = vector_ * kWidth / period;
    int place = vector_ * kWidth - rounds * period;
#pragma unroll
    for (int lane = 0; lane < kWidth; ++lane) {
      take(lane, interleaved ? place : rounds);
      if (++place == period) {
        place = 0;
        ++rounds;
      }
    }
  }

  FASTBN_DEVICE int first_in_row(int channel) const { return channel * geometry_.channel_step; }
  FASTBN_DEVICE int64_t first_offset(const InputActivation&, int channel) const {
    return (first_channel() + channel) * geometry_.channel_step;
  }

  template <int kVectors, bool kReverse, typename Step>
  FASTBN_DEVICE void for_each(const Range& range, Step& step) const {
    if (!active()) return;
    Numbers numbers = kReverse ? numbers_from(range.end - 1 - row_, -rows())
                               : numbers_from(range.begin + row_, rows());
    take_turns<kVectors>(range.count() - row_, rows(), [&](auto count) {
      constexpr int kCount = decltype(count)::kValue;
      step(ThreadTile<scalar_t, kCount, kWidth>{numbers.template next<kCount>()});
    });
  }

  // The rows of a tile lie one after another at `smem`.
  template <int kVectors, bool kInPlace, typename Step>
  FASTBN_DEVICE void for_each_in_smem(const Range& range, unsigned char* smem, Step& step) const {
    if (!active()) return;
    const int row_bytes = geometry_.vectors * kVectorBytes;
    Numbers numbers = numbers_from(range.begin + row_, rows());
    smem += row_ * row_bytes + vector_ * kVectorBytes;
    take_turns<kVectors>(range.count() - row_, rows(), [&](auto count) {
      constexpr int kCount = decltype(count)::kValue;
      step(SmemThreadTile<scalar_t, kCount, kWidth, kInPlace>{{numbers.template next<kCount>()},
                                                              smem,
                                                              rows() * row_bytes,
                                                              geometry_.persistence.tile_bytes});
      smem += kCount * rows() * row_bytes;
    });
  }

  // A span is a row, or all rows where the channel tile has all columns.
  FASTBN_DEVICE int bulk_spans(const Range& range) const {
    return has_all_columns() && range.count() > 1 ? 1 : range.count();
  }
  FASTBN_DEVICE BulkSpan bulk_span(const Range& range, int index) const {
    const int64_t left = geometry_.row_vectors - first_vector();
    const int64_t vectors = left < geometry_.vectors ? left : geometry_.vectors;
    const int rows = has_all_columns() ? range.count() : 1;
    return {((range.begin + index) * geometry_.row_vectors + first_vector()) * kWidth,
            index * geometry_.vectors * kVectorBytes,
            rows * static_cast<int>(vectors) * kVectorBytes};
  }
  FASTBN_DEVICE int bulk_bytes(const Range& range) const {
    const int spans = bulk_spans(range);
    return spans == 0 ? 0 : spans * bulk_span(range, 0).bytes;
  }

  // A box has as many columns of the last channel tile as of others, some beyond the matrix.
  FASTBN_DEVICE int box_column() const { return static_cast<int>(first_vector() * kWidth); }
  FASTBN_DEVICE int box_bytes() const {
    return geometry_.persistence.box_rows * geometry_.vectors * kVectorBytes;
  }

 private:
  FASTBN_DEVICE bool has_all_columns() const { return geometry_.channel_tiles == 1; }

  // The channel tile's first vector of a row.
  FASTBN_DEVICE int64_t first_vector() const { return int64_t{channel_tile_} * geometry_.vectors; }

  // The numbers of a thread's vectors.
  struct Numbers {
    uint32_t number, step;

    template <int kCount>
    FASTBN_DEVICE NumberedPlaces<kCount, kWidth> next() {
      NumberedPlaces<kCount, kWidth> places;
#pragma unroll
      for (int v = 0; v < kCount; ++v, number += step) places.numbers[v] = number;
      return places;
    }
  };
  FASTBN_DEVICE Numbers numbers_from(int64_t row, int rows_further) const {
    const auto row_vectors = static_cast<uint32_t>(geometry_.row_vectors);
    return {
        static_cast<uint32_t>(row) * row_vectors + static_cast<uint32_t>(first_vector() + vector_),
        static_cast<uint32_t>(rows_further) * row_vectors};
  }

  const Problem& problem_;
  const Geometry& geometry_;
  int channel_tile_, split_;
  int row_, vector_;
};

}  // namespace fastbn::cuda
