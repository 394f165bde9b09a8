// SPDX-License-Identifier: BSD-3-Clause
//
// The steps that reduce: statistics of x, and the sums that gradients take.
#pragma once

#include "../layouts/mapping.cuh"
#include "coefficients.cuh"

namespace fastbn::cuda {

// Reduces x to its moments.
template <typename Mapping>
class ReduceStats {
 public:
  using acc_t = typename Mapping::acc_t;
  static constexpr int kTensors = 1;

  FASTBN_DEVICE explicit ReduceStats(const InputActivation& x) : x_(x) {}

  template <typename Tile>
  FASTBN_DEVICE void operator()(const Tile& tile) {
    acc_t values[Tile::kValues];
    tile.template load<gpu::CacheHint::kKeep>(x_, values);
    sums_.add(values);
  }

  // The moments of this thread's values, with means counted from `pivots`, an array of the channel
  // tile's channels.
  FASTBN_DEVICE Moments<acc_t, Mapping::kLanes> result(const Mapping& mapping,
                                                       const acc_t* pivots) const {
    acc_t pivot[Mapping::kLanes];
    load_lanes(mapping, pivots, pivot);
    return sums_.moments(pivot);
  }

 private:
  const InputActivation& x_;
  PivotedSums<acc_t, Mapping::kLanes> sums_;
};

// Reduces dy and x to the sums of dy and of dy * (x - mean). With given statistics dx is known at
// once and written on the way, where wanted.
template <typename Mapping>
class ReduceGrad {
 public:
  using acc_t = typename Mapping::acc_t;
  static constexpr int kLanes = Mapping::kLanes;
  static constexpr int kTensors = 2;

  FASTBN_DEVICE ReduceGrad(const Mapping& mapping, const Backward& op,
                           const ChannelRecords<acc_t>& records)
      : op_(op), write_dx_(!op.training && op.dx.data != nullptr) {
    load_lanes(mapping, records.array(&GradInputs<acc_t>::mean), mean_);
    load_lanes(mapping, records.array(&GradInputs<acc_t>::scale), scale_);
  }

  template <typename Tile>
  FASTBN_DEVICE void operator()(const Tile& tile) {
    acc_t dy[Tile::kValues], x[Tile::kValues];
    tile.template load<gpu::CacheHint::kKeep, 0>(op_.dy, dy);
    tile.template load<gpu::CacheHint::kKeep, 1>(op_.x, x);
#pragma unroll
    for (int i = 0; i < Tile::kValues; ++i) {
      const int lane = i % kLanes;
      const acc_t centered = x[i] - mean_[lane];
      sums_.dy[lane] += dy[i];
      sums_.dy_xmu[lane] += dy[i] * centered;
      dy[i] *= scale_[lane];
    }
    if (write_dx_) tile.store(op_.dx, dy);
  }

  FASTBN_DEVICE const GradSums<acc_t, kLanes>& result() const { return sums_; }

 private:
  const Backward& op_;
  const bool write_dx_;
  acc_t mean_[kLanes], scale_[kLanes];
  GradSums<acc_t, kLanes> sums_;
};

// Reduces a range in order of memory: whoever comes back meets the end of it in the cache.
template <typename Mapping, typename Step>
FASTBN_DEVICE void reduce(const Mapping& mapping, const Range& range, Step& step) {
  mapping.template for_each<Mapping::kOccupancy.loads / Step::kTensors, false>(range, step);
}

}  // namespace fastbn::cuda
