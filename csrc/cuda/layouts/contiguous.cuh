// SPDX-License-Identifier: BSD-3-Clause
//
// Mapping::kContiguous. A block has one channel, whose elements lie in a segment of each contiguous
// sample. Aligned vectors cover each segment; those that reach past an end of it are taken one
// element at a time. Threads take vectors in turn, over the borders of segments, so that none is
// idle where segments are short.
#pragma once

#include "single_channel.cuh"

namespace fastbn::cuda {

template <typename scalar_t, int kWidth>
class Contiguous : public SingleChannel<scalar_t> {
  using Base = SingleChannel<scalar_t>;
  using Base::channel_;
  using Base::geometry_;
  using Base::problem_;

 public:
  static constexpr bool kPersistent = true;
  static constexpr Occupancy kOccupancy = kContiguousOccupancy;

  using Base::Base;

  FASTBN_DEVICE int first_in_row(int) const { return 0; }
  FASTBN_DEVICE int64_t first_offset(const InputActivation&, int) const {
    return channel_ * problem_.spatial;
  }

  template <int kVectors, bool kReverse, typename Step>
  FASTBN_DEVICE void for_each(const Range& range, Step& step) const {
    const int threads = gpu::block_threads();
    const int thread = gpu::thread_index();
    const VectorRange vectors(geometry_, range);
    const int rounds = (vectors.count + threads * kVectors - 1) / (threads * kVectors);
#pragma unroll 1
    for (int i = 0; i < rounds; ++i) {
      const int first = (kReverse ? rounds - 1 - i : i) * threads * kVectors + thread;
      AlignedVector own[kVectors];
      bool all_whole = true;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        own[v] = vector_at(vectors, first + v * threads);
        all_whole = all_whole && own[v].whole();
      }
      if (all_whole) {
        ThreadTile<scalar_t, kVectors, kWidth, ListedPlaces<kVectors>> thread_tile;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) thread_tile.places.offsets[v] = own[v].offset;
        step(thread_tile);
        continue;
      }
#pragma unroll 1
      for (int v = 0; v < kVectors; ++v) take_apart(vector_at(vectors, first + v * threads), step);
    }
  }

  // The vectors of a tile lie one after another at `smem`, and all are whole.
  template <int kVectors, typename Step>
  FASTBN_DEVICE void for_each_in_smem(const Range& range, unsigned char* smem, Step& step) const {
    const int tile_bytes = geometry_.persistence.tile_bytes;
    const int threads = gpu::block_threads();
    const VectorRange vectors(geometry_, range);
    int index = gpu::thread_index();
    if constexpr (kVectors > 1) {
#pragma unroll 1
      for (; index + (kVectors - 1) * threads < vectors.count; index += kVectors * threads) {
        ListedPlaces<kVectors> places;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          places.offsets[v] = vector_at(vectors, index + v * threads).offset;
        }
        step(SmemThreadTile<scalar_t, kVectors, kWidth, ListedPlaces<kVectors>>(
            places, smem + index * kVectorBytes, threads * kVectorBytes, tile_bytes));
      }
    }
#pragma unroll 1
    for (; index < vectors.count; index += threads) {
      step(SmemThreadTile<scalar_t, 1, kWidth, EvenPlaces>(
          {vector_at(vectors, index).offset, 0}, smem + index * kVectorBytes, 0, tile_bytes));
    }
  }

  // A span is the vectors of one sample.
  FASTBN_DEVICE int bulk_spans(const Range& range) const {
    const VectorRange vectors(geometry_, range);
    const uint32_t last = vectors.first_vector + static_cast<uint32_t>(vectors.count) - 1;
    return vectors.count == 0 ? 0
                              : static_cast<int>(fast_divide(last, geometry_.segment_vectors)) + 1;
  }
  FASTBN_DEVICE BulkSpan bulk_span(const Range& range, int index) const {
    const VectorRange vectors(geometry_, range);
    const int per_segment = static_cast<int>(geometry_.segment_vectors.divisor);
    const int skipped = static_cast<int>(vectors.first_vector);
    const int begin = index == 0 ? 0 : index * per_segment - skipped;
    const int after = (index + 1) * per_segment - skipped;
    const int end = after < vectors.count ? after : vectors.count;
    return {vector_at(vectors, begin).offset, begin * kVectorBytes, (end - begin) * kVectorBytes};
  }
  FASTBN_DEVICE int bulk_bytes(const Range& range) const { return range.count() * kVectorBytes; }

 private:
  // Vectors of a range, counted on from those of the sample that the first one lies in.
  struct VectorRange {
    int64_t first_sample;
    uint32_t first_vector;
    int count;

    FASTBN_DEVICE VectorRange(const Geometry& geometry, const Range& range) {
      // Division in 32 bits, which is the usual case, takes a fraction of the instructions.
      first_sample = geometry.extent <= INT32_MAX
                         ? fast_divide(static_cast<uint32_t>(range.begin), geometry.segment_vectors)
                         : range.begin / geometry.segment_vectors.divisor;
      first_vector =
          static_cast<uint32_t>(range.begin - first_sample * geometry.segment_vectors.divisor);
      count = range.count();
    }
  };

  // A vector at a multiple of its size, whose elements from `begin` to `end` belong to the segment.
  struct AlignedVector {
    int64_t offset;
    int begin, end;

    FASTBN_DEVICE bool whole() const { return begin == 0 && end == kWidth; }
  };

  // A vector by its number in a range; one of no elements behind the last.
  FASTBN_DEVICE AlignedVector vector_at(const VectorRange& vectors, int index) const {
    if (index >= vectors.count) return {0, 0, 0};
    const uint32_t from_first = vectors.first_vector + static_cast<uint32_t>(index);
    const uint32_t samples = fast_divide(from_first, geometry_.segment_vectors);
    const uint32_t in_segment = from_first - samples * geometry_.segment_vectors.divisor;
    const int64_t sample = vectors.first_sample + samples;
    const int64_t segment = (sample * problem_.channels + channel_) * problem_.spatial;
    const int64_t offset = segment / kWidth * kWidth + int64_t{in_segment} * kWidth;
    const int64_t before = segment - offset;
    const int64_t until = before + problem_.spatial;
    return {offset, before > 0 ? static_cast<int>(before) : 0,
            until < kWidth ? static_cast<int>(until) : kWidth};
  }

  // Calls step(thread_tile) for the elements of a vector that belong to the segment.
  template <typename Step>
  FASTBN_DEVICE void take_apart(const AlignedVector& vector, Step& step) const {
    if (vector.whole()) {
      step(ThreadTile<scalar_t, 1, kWidth, EvenPlaces>{{vector.offset, 0}});
      return;
    }
#pragma unroll 1
    for (int i = vector.begin; i < vector.end; ++i) {
      step(ThreadTile<scalar_t, 1, 1, EvenPlaces>{{vector.offset + i, 0}});
    }
  }
};

}  // namespace fastbn::cuda
