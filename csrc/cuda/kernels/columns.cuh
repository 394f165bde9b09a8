// SPDX-License-Identifier: BSD-3-Clause
//
// Mapping::kColumns. The activation is a matrix of rows one after another in memory, each column of
// which belongs to one channel. A thread has a vector of adjacent columns and keeps a statistic for
// each; adjacent threads have adjacent vectors, and so on over the rows of a part.
//
//   channels last      a row is a position, a column a channel
//   folded             a row is several positions, so that it is a whole number of vectors
//   small segments     a row is a contiguous sample, and each channel has as many columns as
//                      positions; a slab is so many channels that it is a whole number of vectors
#pragma once

#include "../device/chunk.cuh"

namespace fastbn::cuda {

template <typename scalar_t_, int kWidth>
class Columns {
 public:
  using scalar_t = scalar_t_;
  using acc_t = AccumulateOf<scalar_t>;
  static constexpr int kLanes = kWidth;
  // Whether stages of it reside in shared memory.
  static constexpr bool kHolds = kWidth * sizeof(scalar_t) == kVectorBytes;
  static constexpr Occupancy kOccupancy = kColumnsOccupancy;

  // Refers to its arguments: parameters of the kernel cost no registers.
  FASTBN_DEVICE Columns(const Problem& problem, const Geometry& geometry, int slab, int part)
      : problem_(problem),
        geometry_(geometry),
        slab_(slab),
        part_(part),
        row_(gpu::thread_index() / geometry.vectors),
        vector_(gpu::thread_index() % geometry.vectors) {}

  FASTBN_DEVICE int part() const { return part_; }
  FASTBN_DEVICE int slab() const { return slab_; }
  FASTBN_DEVICE int64_t first_channel() const { return int64_t{slab_} * geometry_.slab_channels; }
  FASTBN_DEVICE int channels() const {
    const int64_t left = problem_.channels - first_channel();
    return left < geometry_.slab_channels ? static_cast<int>(left) : geometry_.slab_channels;
  }

  FASTBN_DEVICE int rows() const { return gpu::block_threads() / geometry_.vectors; }
  FASTBN_DEVICE int row() const { return row_; }
  FASTBN_DEVICE int vectors() const { return geometry_.vectors; }
  FASTBN_DEVICE int vector() const { return vector_; }

  // Whether this thread has any columns; the following ask those that have.
  FASTBN_DEVICE bool active() const { return row_ < rows() && column() < geometry_.matrix_columns; }

  // Calls take(lane, channel) for each lane, its channel counted within the slab. Divides once: the
  // next lane's column is the next of the same channel, or of the next one.
  template <typename Take>
  FASTBN_DEVICE void for_each_lane(const Take& take) const {
    const bool interleaved = geometry_.channel_step == 1;
    const int period = interleaved ? geometry_.slab_channels : geometry_.channel_step;
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

  // Where the first element of a channel lies in the slab's first row.
  FASTBN_DEVICE int first_element(int channel) const { return channel * geometry_.channel_step; }
  // And in an activation.
  FASTBN_DEVICE int64_t origin(const Activation&, int channel) const {
    return (first_channel() + channel) * geometry_.channel_step;
  }

  // Calls body(chunk) for all elements of this thread's columns in its rows of these, in order of
  // memory or from the end.
  template <int kVectors, bool kReverse, typename Body>
  FASTBN_DEVICE void for_each(const Items& items, Body& body) const {
    const int64_t first = items.begin + row_;
    if (!active() || first >= items.end) return;
    const int own_rows = static_cast<int>((items.end - first + rows() - 1) / rows());
    const int chunks = own_rows / kVectors;
    const int64_t step = rows() * geometry_.matrix_columns;
    const int64_t start = first * geometry_.matrix_columns + column();
    int64_t offset = start;
    int64_t advance = kVectors * step;
    if (kReverse) {
      offset += (chunks - 1) * advance;
      advance = -advance;
    }
#pragma unroll 1
    for (int i = 0; i < chunks; ++i, offset += advance) {
      body(Chunk<scalar_t, kVectors, kWidth, EvenPlaces>{{offset, step}});
    }
#pragma unroll 1
    for (int i = chunks * kVectors; i < own_rows; ++i) {
      body(Chunk<scalar_t, 1, kWidth, EvenPlaces>{{start + i * step, step}});
    }
  }

  // The same of a stage: items that lie one after another at `held`.
  template <int kVectors, typename Body>
  FASTBN_DEVICE void for_each_held(const Items& items, unsigned char* held, Body& body) const {
    if (!active()) return;
    const int stage_bytes = geometry_.residence.stage_bytes;
    const int row_bytes = geometry_.vectors * kVectorBytes;
    const int64_t step = rows() * geometry_.matrix_columns;
    int64_t offset = (items.begin + row_) * geometry_.matrix_columns + column();
    held += row_ * row_bytes + vector_ * kVectorBytes;
    int left = items.count() - row_;
    if constexpr (kVectors > 1) {
#pragma unroll 1
      for (; left > (kVectors - 1) * rows(); left -= kVectors * rows()) {
        body(HeldChunk<scalar_t, kVectors, kWidth, EvenPlaces>({offset, step}, held,
                                                               rows() * row_bytes, stage_bytes));
        offset += kVectors * step;
        held += kVectors * rows() * row_bytes;
      }
    }
#pragma unroll 1
    for (; left > 0; left -= rows()) {
      body(HeldChunk<scalar_t, 1, kWidth, EvenPlaces>({offset, step}, held, 0, stage_bytes));
      offset += step;
      held += rows() * row_bytes;
    }
  }

  // The adjacent elements that these consist of: a row each, or all where the slab has all columns.
  FASTBN_DEVICE int runs(const Items& items) const {
    return has_all_columns() && items.count() > 1 ? 1 : items.count();
  }
  FASTBN_DEVICE Run run(const Items& items, int index) const {
    const int64_t first = int64_t{slab_} * geometry_.vectors * kWidth;
    const int64_t left = (geometry_.matrix_columns - first) / kWidth;
    const int64_t vectors = left < geometry_.vectors ? left : geometry_.vectors;
    const int rows = has_all_columns() ? items.count() : 1;
    return {(items.begin + index) * geometry_.matrix_columns + first,
            index * geometry_.vectors * kVectorBytes,
            rows * static_cast<int>(vectors) * kVectorBytes};
  }
  FASTBN_DEVICE int bytes(const Items& items) const {
    const int count = runs(items);
    return count == 0 ? 0 : count * run(items, 0).bytes;
  }

 private:
  FASTBN_DEVICE bool has_all_columns() const { return geometry_.slabs == 1; }

  FASTBN_DEVICE int64_t column() const {
    return (int64_t{slab_} * geometry_.vectors + vector_) * kWidth;
  }

  const Problem& problem_;
  const Geometry& geometry_;
  int slab_, part_;
  int row_, vector_;
};

}  // namespace fastbn::cuda
