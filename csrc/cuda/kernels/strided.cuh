// SPDX-License-Identifier: BSD-3-Clause
//
// Mapping::kStrided. A block has one channel, and its threads take the channel's elements in turn,
// one by one, wherever the strides of each activation put them.
#pragma once

#include "../device/chunk.cuh"

namespace fastbn::cuda {

template <typename scalar_t_>
class Strided {
 public:
  using scalar_t = scalar_t_;
  using acc_t = AccumulateOf<scalar_t>;
  static constexpr int kLanes = 1;
  // Whether stages of it reside in shared memory.
  static constexpr bool kHolds = false;
  static constexpr Occupancy kOccupancy = kStridedOccupancy;

  FASTBN_DEVICE Strided(const Problem& problem, const Geometry& geometry, int slab, int part)
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
  FASTBN_DEVICE int64_t origin(const Activation& activation, int) const {
    return channel_ * activation.channel_stride;
  }

  // One element at a time, whatever kVectors: strides leave no registers for more.
  template <int kVectors, bool kReverse, typename Body>
  FASTBN_DEVICE void for_each(const Items& items, Body& body) const {
    int64_t element = items.begin + gpu::thread_index();
#pragma unroll 1
    for (; element < items.end; element += gpu::block_threads()) {
      body(Chunk<scalar_t, 1, 1, Places>{{problem_, channel_, element}});
    }
  }

 private:
  // An element of a channel, counted over all samples.
  struct Places {
    const Problem& problem;
    int channel;
    int64_t element;

    FASTBN_DEVICE int64_t offset(const Activation& activation, int) const {
      const int64_t sample = element / problem.spatial;
      int64_t position = element - sample * problem.spatial;
      int64_t offset = sample * activation.batch_stride + channel * activation.channel_stride;
      for (int d = activation.spatial_dims - 1; d >= 0; --d) {
        const int64_t outer = position / activation.sizes[d];
        offset += (position - outer * activation.sizes[d]) * activation.strides[d];
        position = outer;
      }
      return offset;
    }
  };

  const Problem& problem_;
  const Geometry& geometry_;
  int channel_, part_;
};

}  // namespace fastbn::cuda
