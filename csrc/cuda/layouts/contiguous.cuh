// SPDX-License-Identifier: BSD-3-Clause
//
// Mapping::kContiguous. A block has one channel, whose elements lie in a segment of each contiguous
// sample. Aligned vectors cover each segment. Where segments are no whole vectors, those at their
// ends hold elements of other channels, too. Threads take vectors in turn, over the borders of
// segments, so that none is idle where segments are short.
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
  static constexpr bool kHasBoxes = false;
  static constexpr Occupancy kOccupancy = kContiguousOccupancy;

  using Base::Base;

  FASTBN_DEVICE int first_in_row(int) const { return 0; }
  FASTBN_DEVICE int64_t first_offset(const InputActivation&, int) const {
    return channel_ * problem_.spatial;
  }

  template <int kVectors, bool kReverse, typename Step>
  FASTBN_DEVICE void for_each(const Range& range, Step& step) const {
    const int threads = geometry_.threads;
    const int thread = gpu::thread_index();
    if (thread >= range.count()) return;
    const Place first = place_of(kReverse ? range.end - 1 - thread : range.begin + thread);
    if (Step::kWholeVectors || problem_.spatial % kWidth == 0) {
      WholeVectors<kReverse> vectors(*this, first);
      take_turns<kVectors>(range.count() - thread, threads, [&](auto count) {
        constexpr int kCount = decltype(count)::kValue;
        step(ThreadTile<scalar_t, kCount, kWidth>{vectors.template next<kCount>()});
      });
    } else if constexpr (!Step::kWholeVectors) {
      // The bits of what a thread has take registers, too.
      PartialVectors<kReverse> vectors(*this, first);
      take_turns<(kVectors + 1) / 2>(range.count() - thread, threads, [&](auto count) {
        step(vectors.template next<decltype(count)::kValue>());
      });
    }
  }

  // The vectors of a tile lie one after another at `smem`, and all are whole.
  template <int kVectors, bool kInPlace, typename Step>
  FASTBN_DEVICE void for_each_in_smem(const Range& range, unsigned char* smem, Step& step) const {
    const int threads = geometry_.threads;
    const int thread = gpu::thread_index();
    WholeVectors<false> vectors(*this, place_of(range.begin + thread));
    smem += thread * kVectorBytes;
    take_turns<kVectors>(range.count() - thread, threads, [&](auto count) {
      constexpr int kCount = decltype(count)::kValue;
      step(SmemThreadTile<scalar_t, kCount, kWidth, kInPlace>{{vectors.template next<kCount>()},
                                                              smem,
                                                              threads * kVectorBytes,
                                                              geometry_.persistence.tile_bytes});
      smem += kCount * threads * kVectorBytes;
    });
  }

  // A span is the vectors of one sample.
  FASTBN_DEVICE int bulk_spans(const Range& range) const {
    return range.count() == 0
               ? 0
               : static_cast<int>(sample_of(range.end - 1) - sample_of(range.begin)) + 1;
  }
  FASTBN_DEVICE BulkSpan bulk_span(const Range& range, int index) const {
    const int segment = geometry_.segment_vectors.divisor;
    const Place first = place_of(range.begin);
    const int begin = index == 0 ? 0 : index * segment - first.in_segment;
    const int after = (index + 1) * segment - first.in_segment;
    const int end = after < range.count() ? after : range.count();
    const int64_t in_sample = index == 0 ? first.in_segment : 0;
    return {segment_begin(first.sample + index) + in_sample * kWidth, begin * kVectorBytes,
            (end - begin) * kVectorBytes};
  }
  FASTBN_DEVICE int bulk_bytes(const Range& range) const { return range.count() * kVectorBytes; }

 private:
  // A vector by its sample, and by its number among those that cover the sample's segment.
  struct Place {
    int64_t sample;
    int in_segment;
  };

  FASTBN_DEVICE int64_t sample_of(int64_t vector) const {
    // Division in 32 bits, which is the usual case, takes a fraction of the instructions.
    return geometry_.extent <= INT32_MAX
               ? fast_divide(static_cast<uint32_t>(vector), geometry_.segment_vectors)
               : vector / geometry_.segment_vectors.divisor;
  }
  FASTBN_DEVICE Place place_of(int64_t vector) const {
    const int64_t sample = sample_of(vector);
    return {sample, static_cast<int>(vector - sample * geometry_.segment_vectors.divisor)};
  }
  FASTBN_DEVICE int64_t segment_begin(int64_t sample) const {
    return (sample * problem_.channels + channel_) * problem_.spatial;
  }

  // A thread's vectors where segments are whole vectors, in order of memory or against it.
  template <bool kReverse>
  class WholeVectors {
   public:
    FASTBN_DEVICE WholeVectors(const Contiguous& mapping, const Place& first)
        : segment_(mapping.geometry_.segment_vectors.divisor),
          step_(mapping.geometry_.thread_step.vectors),
          in_segment_(first.in_segment) {
      const auto sample = static_cast<uint32_t>(mapping.problem_.channels) * segment_;
      const auto samples = static_cast<uint32_t>(mapping.geometry_.thread_step.samples);
      number_ = static_cast<uint32_t>(first.sample) * sample +
                static_cast<uint32_t>(mapping.channel_) * segment_ + first.in_segment;
      numbers_further_ = samples * sample + step_;
      between_segments_ = sample - segment_;
    }

    template <int kCount>
    FASTBN_DEVICE NumberedPlaces<kCount, kWidth> next() {
      NumberedPlaces<kCount, kWidth> places;
#pragma unroll
      for (int v = 0; v < kCount; ++v) {
        places.numbers[v] = number_;
        if (kReverse) {
          number_ -= numbers_further_;
          in_segment_ -= step_;
          if (in_segment_ < 0) {
            number_ -= between_segments_;
            in_segment_ += segment_;
          }
        } else {
          number_ += numbers_further_;
          in_segment_ += step_;
          if (in_segment_ >= segment_) {
            number_ += between_segments_;
            in_segment_ -= segment_;
          }
        }
      }
      return places;
    }

   private:
    const int segment_, step_;
    int in_segment_;
    uint32_t number_, numbers_further_, between_segments_;
  };

  // The same where the vectors at the ends of segments hold elements of other channels, too.
  template <bool kReverse>
  class PartialVectors {
   public:
    FASTBN_DEVICE PartialVectors(const Contiguous& mapping, const Place& first)
        : mapping_(mapping),
          in_segment_(first.in_segment),
          segment_begin_(mapping.segment_begin(first.sample)) {}

    template <int kCount>
    FASTBN_DEVICE PartialThreadTile<scalar_t, kCount, kWidth> next() {
      PartialThreadTile<scalar_t, kCount, kWidth> tile;
      const Problem& problem = mapping_.problem_;
      tile.elements = problem.batch * problem.channels * problem.spatial;
#pragma unroll
      for (int v = 0; v < kCount; ++v) {
        const int before = static_cast<int>(segment_begin_ % kWidth);
        const int64_t behind = before + problem.spatial - int64_t{in_segment_} * kWidth;
        tile.places.numbers[v] = static_cast<uint32_t>(segment_begin_ / kWidth) + in_segment_;
        tile.masks[v] = bits_below(behind) & ~bits_below(in_segment_ == 0 ? before : 0);
        go_on();
      }
      return tile;
    }

   private:
    FASTBN_DEVICE static unsigned bits_below(int64_t end) {
      const int bits = end < 0 ? 0 : end < kWidth ? static_cast<int>(end) : kWidth;
      return (1u << bits) - 1;
    }

    FASTBN_DEVICE void go_on() {
      const ThreadStep& step = mapping_.geometry_.thread_step;
      const int segment = mapping_.geometry_.segment_vectors.divisor;
      int samples = step.samples;
      in_segment_ += kReverse ? -step.vectors : step.vectors;
      if (kReverse ? in_segment_ < 0 : in_segment_ >= segment) {
        in_segment_ += kReverse ? segment : -segment;
        ++samples;
      }
      const int64_t further = samples * mapping_.problem_.channels * mapping_.problem_.spatial;
      segment_begin_ += kReverse ? -further : further;
    }

    const Contiguous& mapping_;
    int in_segment_;
    int64_t segment_begin_;
  };
};

}  // namespace fastbn::cuda
