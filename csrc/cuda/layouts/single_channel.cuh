// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "../primitives/channel_values.cuh"
#include "../primitives/thread_tile.cuh"

namespace fastbn::cuda {

// The part that Contiguous and Generic share: a block has one channel, and a thread is a row of its
// own.
template <typename scalar_t_>
class SingleChannel {
 public:
  using scalar_t = scalar_t_;
  using acc_t = acc_type<scalar_t>;
  static constexpr int kLanes = 1;

  FASTBN_DEVICE SingleChannel(const Problem& problem, const Geometry& geometry, int channel_tile,
                              int split)
      : problem_(problem), geometry_(geometry), channel_(channel_tile), split_(split) {}

  FASTBN_DEVICE int split() const { return split_; }
  FASTBN_DEVICE int channel_tile() const { return channel_; }
  FASTBN_DEVICE int64_t first_channel() const { return channel_; }
  FASTBN_DEVICE int channels() const { return 1; }

  FASTBN_DEVICE int rows() const { return geometry_.threads; }
  FASTBN_DEVICE int row() const { return gpu::thread_index(); }
  FASTBN_DEVICE int vectors() const { return 1; }
  FASTBN_DEVICE int vector() const { return 0; }

  FASTBN_DEVICE bool active() const { return gpu::thread_index() < geometry_.threads; }
  template <typename Take>
  FASTBN_DEVICE void for_each_lane(const Take& take) const {
    take(0, 0);
  }

 protected:
  // References: parameters of the kernel cost no registers.
  const Problem& problem_;
  const Geometry& geometry_;
  const int channel_, split_;
};

}  // namespace fastbn::cuda
