// SPDX-License-Identifier: BSD-3-Clause
//
// The steps that apply finalized coefficients to elements.
#pragma once

#include "../layouts/mapping.cuh"
#include "coefficients.cuh"

namespace fastbn::cuda {

// Writes y. Forward is TrainingForward or EvalForward.
template <typename Mapping, typename Forward>
class ApplyForward {
 public:
  using acc_t = typename Mapping::acc_t;
  static constexpr int kLanes = Mapping::kLanes;
  static constexpr int kTensors = 1;

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
  static constexpr int kTensors = 2;

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
