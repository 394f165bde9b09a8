// SPDX-License-Identifier: BSD-3-Clause
//
// The steps that take elements: reductions to statistics and to the sums that gradients take, and
// those that apply finalized coefficients.
#pragma once

#include "../layouts/mapping.cuh"
#include "finalize.cuh"

namespace fastbn::cuda {

// What training reads: a step's load<..., kTensor>() is of the kTensor-th of these.
constexpr int kForwardInputs = 1;
constexpr int kBackwardInputs = 2;
FASTBN_HOST_DEVICE Inputs<kForwardInputs> inputs(const TrainingForward& op) { return {{&op.x}}; }
FASTBN_HOST_DEVICE Inputs<kBackwardInputs> inputs(const Backward& op) { return {{&op.dy, &op.x}}; }

// The number of each lane of a thread, from an array of the channel tile's channels.
template <typename Mapping>
FASTBN_DEVICE void load_lanes(const Mapping& mapping, const typename Mapping::acc_t* array,
                              typename Mapping::acc_t (&lanes)[Mapping::kLanes]) {
  mapping.for_each_lane(
      [&](int lane, int channel) { lanes[lane] = mapping.active() ? array[channel] : 0; });
}

// --- Reduce --------------------------------------------------------------------------------------

// Reduces x to its moments.
template <typename Mapping>
class ReduceStats {
 public:
  using acc_t = typename Mapping::acc_t;
  static constexpr int kTensors = kForwardInputs;

  FASTBN_DEVICE explicit ReduceStats(const InputActivation& x) : x_(x) {}

  template <typename Tile>
  FASTBN_DEVICE void operator()(const Tile& tile) {
    acc_t values[Tile::kValues];
    tile.template load<gpu::CacheHint::kKeep>(x_, values);
    sums_.add(tile, values);
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
// once: kWriteDx writes it on the way.
template <typename Mapping, bool kWriteDx>
class ReduceGrad {
 public:
  using acc_t = typename Mapping::acc_t;
  static constexpr int kLanes = Mapping::kLanes;
  static constexpr int kTensors = kBackwardInputs;

  FASTBN_DEVICE ReduceGrad(const Mapping& mapping, const Backward& op,
                           const ChannelRecords<acc_t>& records)
      : op_(op) {
    load_lanes(mapping, records.array(&GradInputs<acc_t>::mean), mean_);
    if (kWriteDx) load_lanes(mapping, records.array(&GradInputs<acc_t>::scale), scale_);
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
      if (kWriteDx) dy[i] *= scale_[lane];
    }
    if (kWriteDx) tile.store(op_.dx, dy);
  }

  FASTBN_DEVICE const GradSums<acc_t, kLanes>& result() const { return sums_; }

 private:
  const Backward& op_;
  acc_t mean_[kLanes], scale_[kLanes];
  GradSums<acc_t, kLanes> sums_;
};

// Reduces a range in order of memory: whoever comes back meets the end of it in the cache.
template <typename Mapping, typename Step>
FASTBN_DEVICE void reduce(const Mapping& mapping, const Range& range, Step& step) {
  mapping.template for_each<Mapping::kOccupancy.loads / Step::kTensors, false>(range, step);
}

// --- Apply ---------------------------------------------------------------------------------------

// Writes y. Forward is TrainingForward or EvalForward.
template <typename Mapping, typename Forward>
class ApplyForward {
 public:
  using acc_t = typename Mapping::acc_t;
  static constexpr int kLanes = Mapping::kLanes;
  static constexpr int kTensors = kForwardInputs;

  FASTBN_DEVICE ApplyForward(const Mapping& mapping, const Forward& op,
                             const ChannelRecords<acc_t>& records)
      : op_(op) {
    load_lanes(mapping, records.array(&Affine<acc_t>::mean), mean_);
    load_lanes(mapping, records.array(&Affine<acc_t>::scale), scale_);
    load_lanes(mapping, records.array(&Affine<acc_t>::shift), shift_);
  }

  template <typename Tile>
  FASTBN_DEVICE void operator()(const Tile& tile) const {
    acc_t values[Tile::kValues];
    tile.template load<gpu::CacheHint::kStream>(op_.x, values);
#pragma unroll
    for (int i = 0; i < Tile::kValues; ++i) {
      const int lane = i % kLanes;
      values[i] = (values[i] - mean_[lane]) * scale_[lane] + shift_[lane];
    }
    tile.store(op_.y, values);
  }

 private:
  const Forward& op_;
  acc_t mean_[kLanes], scale_[kLanes], shift_[kLanes];
};

// Writes dx in training.
template <typename Mapping>
class ApplyBackward {
 public:
  using acc_t = typename Mapping::acc_t;
  static constexpr int kLanes = Mapping::kLanes;
  static constexpr int kTensors = kBackwardInputs;

  FASTBN_DEVICE ApplyBackward(const Mapping& mapping, const Backward& op,
                              const ChannelRecords<acc_t>& records)
      : op_(op) {
    load_lanes(mapping, records.array(&GradAffine<acc_t>::mean), mean_);
    load_lanes(mapping, records.array(&GradAffine<acc_t>::scale), scale_);
    load_lanes(mapping, records.array(&GradAffine<acc_t>::slope), slope_);
    load_lanes(mapping, records.array(&GradAffine<acc_t>::offset), offset_);
  }

  template <typename Tile>
  FASTBN_DEVICE void operator()(const Tile& tile) const {
    acc_t dy[Tile::kValues], x[Tile::kValues];
    tile.template load<gpu::CacheHint::kStream, 0>(op_.dy, dy);
    tile.template load<gpu::CacheHint::kStream, 1>(op_.x, x);
#pragma unroll
    for (int i = 0; i < Tile::kValues; ++i) {
      const int lane = i % kLanes;
      const acc_t centered = x[i] - mean_[lane];
      dy[i] = scale_[lane] * dy[i] + (slope_[lane] * centered + offset_[lane]);
    }
    tile.store(op_.dx, dy);
  }

 private:
  const Backward& op_;
  acc_t mean_[kLanes], scale_[kLanes], slope_[kLanes], offset_[kLanes];
};

// Writes dx with given statistics, where nothing else is wanted: x is not read.
template <typename Mapping>
class ApplyBackwardEval {
 public:
  using acc_t = typename Mapping::acc_t;
  static constexpr int kTensors = 1;

  FASTBN_DEVICE ApplyBackwardEval(const Mapping& mapping, const Backward& op,
                                  const ChannelRecords<acc_t>& records)
      : op_(op) {
    load_lanes(mapping, records.array(&GradInputs<acc_t>::scale), scale_);
  }

  template <typename Tile>
  FASTBN_DEVICE void operator()(const Tile& tile) const {
    acc_t values[Tile::kValues];
    tile.template load<gpu::CacheHint::kStream>(op_.dy, values);
#pragma unroll
    for (int i = 0; i < Tile::kValues; ++i) values[i] *= scale_[i % Mapping::kLanes];
    tile.store(op_.dx, values);
  }

 private:
  const Backward& op_;
  acc_t scale_[Mapping::kLanes];
};

// Applies to a range from its end: what was read last is still in the cache.
template <typename Mapping, typename Step>
FASTBN_DEVICE void apply(const Mapping& mapping, const Range& range, const Step& step) {
  mapping.template for_each<Mapping::kOccupancy.loads / Step::kTensors, true>(range, step);
}

}  // namespace fastbn::cuda
