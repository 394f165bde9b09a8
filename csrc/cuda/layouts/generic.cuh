// SPDX-License-Identifier: BSD-3-Clause
//
// Mapping::kGeneric. A block has one channel, and its threads take the channel's elements in turn,
// one by one, wherever the strides of each activation put them.
#pragma once

#include "single_channel.cuh"

namespace fastbn::cuda {

template <typename scalar_t>
class Generic : public SingleChannel<scalar_t> {
  using Base = SingleChannel<scalar_t>;
  using Base::channel_;
  using Base::geometry_;
  using Base::problem_;

 public:
  static constexpr bool kPersistent = false;
  static constexpr Occupancy kOccupancy = kGenericOccupancy;

  using Base::Base;

  FASTBN_DEVICE int64_t first_offset(const InputActivation& activation, int) const {
    return channel_ * activation.channel_stride;
  }

  // One element at a time, whatever kVectors: strides leave no registers for more.
  template <int kVectors, bool kReverse, typename Step>
  FASTBN_DEVICE void for_each(const Range& range, Step& step) const {
    int64_t element = range.begin + gpu::thread_index();
#pragma unroll 1
    for (; element < range.end; element += geometry_.threads) {
      step(ThreadTile<scalar_t, 1, 1, Places>{{problem_, channel_, element}});
    }
  }

 private:
  // An element of a channel, counted over all samples.
  struct Places {
    const Problem& problem;
    int channel;
    int64_t element;

    template <typename Data>
    FASTBN_DEVICE int64_t offset(const Activation<Data>& activation, int) const {
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
};

}  // namespace fastbn::cuda
