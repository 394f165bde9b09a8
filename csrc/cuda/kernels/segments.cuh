// SPDX-License-Identifier: BSD-3-Clause
//
// Mapping::kSegments. A block has one channel, whose elements lie in a segment of each contiguous
// sample. Windows of the size of a vector, laid where vectors are aligned, cover each segment;
// those that reach past an end of it are taken one element at a time. Threads take windows in turn,
// over the borders of segments, so that none is idle where segments are short.
#pragma once

#include "../device/chunk.cuh"

namespace fastbn::cuda {

template <typename scalar_t_, int kWidth>
class Segments {
 public:
  using scalar_t = scalar_t_;
  using acc_t = AccumulateOf<scalar_t>;
  static constexpr int kLanes = 1;
  // Whether stages of it reside in shared memory.
  static constexpr bool kHolds = true;
  static constexpr Occupancy kOccupancy = kSegmentsOccupancy;

  FASTBN_DEVICE Segments(const Problem& problem, const Geometry& geometry, int slab, int part)
      : problem_(problem), geometry_(geometry), channel_(slab), part_(part) {}

  FASTBN_DEVICE int part() const { return part_; }
  FASTBN_DEVICE int slab() const { return channel_; }
  FASTBN_DEVICE int64_t first_channel() const { return channel_; }
  FASTBN_DEVICE int channels() const { return 1; }

  FASTBN_DEVICE int rows() const { return gpu::block_threads(); }
  FASTBN_DEVICE int row() const { return gpu::thread_index(); }
  FASTBN_DEVICE int vectors() const { return 1; }
  FASTBN_DEVICE int vector() const { return 0; }

  FASTBN_DEVICE bool active() const { return true; }
  template <typename Take>
  FASTBN_DEVICE void for_each_lane(const Take& take) const {
    take(0, 0);
  }
  FASTBN_DEVICE int first_element(int) const { return 0; }
  FASTBN_DEVICE int64_t origin(const Activation&, int) const { return channel_ * problem_.spatial; }

  template <int kVectors, bool kReverse, typename Body>
  FASTBN_DEVICE void for_each(const Items& items, Body& body) const {
    const int threads = gpu::block_threads();
    const int thread = gpu::thread_index();
    const Range range(geometry_, items);
    const int chunks = (range.items + threads * kVectors - 1) / (threads * kVectors);
#pragma unroll 1
    for (int i = 0; i < chunks; ++i) {
      const int first = (kReverse ? chunks - 1 - i : i) * threads * kVectors + thread;
      Window windows[kVectors];
      bool all_whole = true;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        windows[v] = window(range, first + v * threads);
        all_whole = all_whole && windows[v].whole();
      }
      if (all_whole) {
        Chunk<scalar_t, kVectors, kWidth, ListedPlaces<kVectors>> chunk;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) chunk.places.offsets[v] = windows[v].offset;
        body(chunk);
        continue;
      }
#pragma unroll 1
      for (int v = 0; v < kVectors; ++v) piece_by_piece(window(range, first + v * threads), body);
    }
  }

  // Of a stage, whose windows lie one after another at `held`. All windows are whole.
  template <int kVectors, typename Body>
  FASTBN_DEVICE void for_each_held(const Items& items, unsigned char* held, Body& body) const {
    const int stage_bytes = geometry_.residence.stage_bytes;
    const int threads = gpu::block_threads();
    const Range range(geometry_, items);
    int item = gpu::thread_index();
    if constexpr (kVectors > 1) {
#pragma unroll 1
      for (; item + (kVectors - 1) * threads < range.items; item += kVectors * threads) {
        ListedPlaces<kVectors> places;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          places.offsets[v] = window(range, item + v * threads).offset;
        }
        body(HeldChunk<scalar_t, kVectors, kWidth, ListedPlaces<kVectors>>(
            places, held + item * kVectorBytes, threads * kVectorBytes, stage_bytes));
      }
    }
#pragma unroll 1
    for (; item < range.items; item += threads) {
      body(HeldChunk<scalar_t, 1, kWidth, EvenPlaces>({window(range, item).offset, 0},
                                                      held + item * kVectorBytes, 0, stage_bytes));
    }
  }

  // The adjacent windows that these consist of: those of one sample each.
  FASTBN_DEVICE int runs(const Items& items) const {
    const Range range(geometry_, items);
    const uint32_t last = range.first_window + static_cast<uint32_t>(range.items) - 1;
    return range.items == 0 ? 0 : static_cast<int>(divide(last, geometry_.windows)) + 1;
  }
  FASTBN_DEVICE Run run(const Items& items, int index) const {
    const Range range(geometry_, items);
    const int windows = static_cast<int>(geometry_.windows.divisor);
    const int skipped = static_cast<int>(range.first_window);
    const int begin = index == 0 ? 0 : index * windows - skipped;
    const int after = (index + 1) * windows - skipped;
    const int end = after < range.items ? after : range.items;
    return {window(range, begin).offset, begin * kVectorBytes, (end - begin) * kVectorBytes};
  }
  FASTBN_DEVICE int bytes(const Items& items) const { return items.count() * kVectorBytes; }

 private:
  // Windows, counted on from those of the first one's sample.
  struct Range {
    int64_t first_sample;
    uint32_t first_window;
    int items;

    FASTBN_DEVICE Range(const Geometry& geometry, const Items& range) {
      // The usual case at a fraction of the instructions.
      first_sample = geometry.items <= INT32_MAX
                         ? divide(static_cast<uint32_t>(range.begin), geometry.windows)
                         : range.begin / geometry.windows.divisor;
      first_window = static_cast<uint32_t>(range.begin - first_sample * geometry.windows.divisor);
      items = range.count();
    }
  };

  // An aligned vector, of which the elements from `begin` to `end` belong to the segment.
  struct Window {
    int64_t offset;
    int begin, end;

    FASTBN_DEVICE bool whole() const { return begin == 0 && end == kWidth; }
  };

  FASTBN_DEVICE Window window(const Range& range, int item) const {
    if (item >= range.items) return {0, 0, 0};
    const uint32_t from_first = range.first_window + static_cast<uint32_t>(item);
    const uint32_t samples = divide(from_first, geometry_.windows);
    const uint32_t index = from_first - samples * geometry_.windows.divisor;
    const int64_t sample = range.first_sample + samples;
    const int64_t segment = (sample * problem_.channels + channel_) * problem_.spatial;
    const int64_t offset = segment / kWidth * kWidth + int64_t{index} * kWidth;
    const int64_t before = segment - offset;
    const int64_t until = before + problem_.spatial;
    return {offset, before > 0 ? static_cast<int>(before) : 0,
            until < kWidth ? static_cast<int>(until) : kWidth};
  }

  template <typename Body>
  FASTBN_DEVICE void piece_by_piece(const Window& window, Body& body) const {
    if (window.whole()) {
      body(Chunk<scalar_t, 1, kWidth, EvenPlaces>{{window.offset, 0}});
      return;
    }
#pragma unroll 1
    for (int i = window.begin; i < window.end; ++i) {
      body(Chunk<scalar_t, 1, 1, EvenPlaces>{{window.offset + i, 0}});
    }
  }

  const Problem& problem_;
  const Geometry& geometry_;
  int channel_, part_;
};

}  // namespace fastbn::cuda
