// SPDX-License-Identifier: BSD-3-Clause
//
// The steps that every algorithm has in common: gathering from a part, and applying coefficients to
// it. What a fused operation adds to batch norm goes through its epilogue, here alone.
#pragma once

#include "../device/chunk.cuh"
#include "finish.cuh"

namespace fastbn::cuda {

// What follows the normalisation: nothing. An epilogue maps the normalised value to the output, and
// the output's gradient to that of the normalised value, given x - mean.
template <typename acc_t>
struct Identity {
  FASTBN_DEVICE acc_t forward(acc_t normalised) const { return normalised; }
  FASTBN_DEVICE acc_t backward(acc_t dy, acc_t) const { return dy; }
};

// The coefficient of each lane of a thread, from an array of the slab's channels.
template <typename Mapping>
FASTBN_DEVICE void load_lanes(const Mapping& mapping, const typename Mapping::acc_t* array,
                              typename Mapping::acc_t (&lanes)[Mapping::kLanes]) {
  mapping.for_each_lane(
      [&](int lane, int channel) { lanes[lane] = mapping.active() ? array[channel] : 0; });
}

// The steps are function objects that a mapping calls with the chunks of some items, and that read
// kTensors activations.

// Gathers shifted sums of x.
template <typename Mapping>
class GatherMoments {
 public:
  using acc_t = typename Mapping::acc_t;
  static constexpr int kTensors = 1;

  FASTBN_DEVICE explicit GatherMoments(const Activation& x) : x_(x) {}

  template <typename Chunk>
  FASTBN_DEVICE void operator()(const Chunk& chunk) {
    acc_t values[Chunk::kValues];
    chunk.template load<gpu::Reuse::kLikely>(x_, values);
    sums_.add(values);
  }

  // With means counted from `reference`, an array of the slab's channels.
  FASTBN_DEVICE Moments<acc_t, Mapping::kLanes> result(const Mapping& mapping,
                                                       const acc_t* reference) const {
    acc_t origin[Mapping::kLanes];
    load_lanes(mapping, reference, origin);
    return sums_.moments(origin);
  }

 private:
  const Activation& x_;
  ShiftedSums<acc_t, Mapping::kLanes> sums_;
};

// Writes y.
template <typename Mapping, typename Epilogue>
class Normalise {
 public:
  using acc_t = typename Mapping::acc_t;
  static constexpr int kLanes = Mapping::kLanes;
  static constexpr int kTensors = 1;

  FASTBN_DEVICE Normalise(const Mapping& mapping, const Activation& x, const Activation& y,
                          const acc_t* coefficients, int slab_channels, const Epilogue& epilogue)
      : x_(x), y_(y), epilogue_(epilogue) {
    load_lanes(mapping, coefficients + kMean * slab_channels, mean_);
    load_lanes(mapping, coefficients + kScale * slab_channels, scale_);
    load_lanes(mapping, coefficients + kShift * slab_channels, shift_);
  }

  template <typename Chunk>
  FASTBN_DEVICE void operator()(const Chunk& chunk) const {
    acc_t values[Chunk::kValues];
    chunk.template load<gpu::Reuse::kNone>(x_, values);
#pragma unroll
    for (int i = 0; i < Chunk::kValues; ++i) {
      const int lane = i % kLanes;
      values[i] = epilogue_.forward((values[i] - mean_[lane]) * scale_[lane] + shift_[lane]);
    }
    chunk.store(y_, values);
  }

 private:
  const Activation& x_;
  const Activation& y_;
  const Epilogue& epilogue_;
  acc_t mean_[kLanes], scale_[kLanes], shift_[kLanes];
};

// Gathers sums of dy and of dy * (x - mean). With given statistics dx is known at once and written
// on the way, where wanted.
template <typename Mapping, typename Epilogue>
class GatherGradients {
 public:
  using acc_t = typename Mapping::acc_t;
  static constexpr int kLanes = Mapping::kLanes;
  static constexpr int kTensors = 2;

  FASTBN_DEVICE GatherGradients(const Mapping& mapping, const Backward& op,
                                const acc_t* coefficients, int slab_channels,
                                const Epilogue& epilogue)
      : op_(op), epilogue_(epilogue), write_dx_(!op.training && op.dx.data != nullptr) {
    load_lanes(mapping, coefficients + kMean * slab_channels, mean_);
    load_lanes(mapping, coefficients + kScale * slab_channels, scale_);
  }

  template <typename Chunk>
  FASTBN_DEVICE void operator()(const Chunk& chunk) {
    acc_t dy[Chunk::kValues], x[Chunk::kValues];
    chunk.template load<gpu::Reuse::kLikely, 0>(op_.dy, dy);
    chunk.template load<gpu::Reuse::kLikely, 1>(op_.x, x);
#pragma unroll
    for (int i = 0; i < Chunk::kValues; ++i) {
      const int lane = i % kLanes;
      const acc_t centred = x[i] - mean_[lane];
      dy[i] = epilogue_.backward(dy[i], centred);
      sums_.dy[lane] += dy[i];
      sums_.dy_xmu[lane] += dy[i] * centred;
      dy[i] *= scale_[lane];
    }
    if (write_dx_) chunk.store(op_.dx, dy);
  }

  FASTBN_DEVICE const GradSums<acc_t, kLanes>& result() const { return sums_; }

 private:
  const Backward& op_;
  const Epilogue& epilogue_;
  const bool write_dx_;
  acc_t mean_[kLanes], scale_[kLanes];
  GradSums<acc_t, kLanes> sums_;
};

// Writes dx in training.
template <typename Mapping, typename Epilogue>
class Differentiate {
 public:
  using acc_t = typename Mapping::acc_t;
  static constexpr int kLanes = Mapping::kLanes;
  static constexpr int kTensors = 2;

  FASTBN_DEVICE Differentiate(const Mapping& mapping, const Backward& op, const acc_t* coefficients,
                              int slab_channels, const Epilogue& epilogue)
      : op_(op), epilogue_(epilogue) {
    load_lanes(mapping, coefficients + kMean * slab_channels, mean_);
    load_lanes(mapping, coefficients + kScale * slab_channels, scale_);
    load_lanes(mapping, coefficients + kSlope * slab_channels, slope_);
    load_lanes(mapping, coefficients + kOffset * slab_channels, offset_);
  }

  template <typename Chunk>
  FASTBN_DEVICE void operator()(const Chunk& chunk) const {
    acc_t dy[Chunk::kValues], x[Chunk::kValues];
    chunk.template load<gpu::Reuse::kNone, 0>(op_.dy, dy);
    chunk.template load<gpu::Reuse::kNone, 1>(op_.x, x);
#pragma unroll
    for (int i = 0; i < Chunk::kValues; ++i) {
      const int lane = i % kLanes;
      const acc_t centred = x[i] - mean_[lane];
      dy[i] = scale_[lane] * epilogue_.backward(dy[i], centred) +
              (slope_[lane] * centred + offset_[lane]);
    }
    chunk.store(op_.dx, dy);
  }

 private:
  const Backward& op_;
  const Epilogue& epilogue_;
  acc_t mean_[kLanes], scale_[kLanes], slope_[kLanes], offset_[kLanes];
};

// Writes dx with given statistics, for those who want nothing else: x is not read. An epilogue that
// looks at x goes through GatherGradients.
template <typename Mapping>
class ScaleGradient {
 public:
  using acc_t = typename Mapping::acc_t;
  static constexpr int kTensors = 1;

  FASTBN_DEVICE ScaleGradient(const Mapping& mapping, const Backward& op, const acc_t* coefficients,
                              int slab_channels)
      : op_(op) {
    load_lanes(mapping, coefficients + kScale * slab_channels, scale_);
  }

  template <typename Chunk>
  FASTBN_DEVICE void operator()(const Chunk& chunk) const {
    acc_t values[Chunk::kValues];
    chunk.template load<gpu::Reuse::kNone>(op_.dy, values);
#pragma unroll
    for (int i = 0; i < Chunk::kValues; ++i) values[i] *= scale_[i % Mapping::kLanes];
    chunk.store(op_.dx, values);
  }

 private:
  const Backward& op_;
  acc_t scale_[Mapping::kLanes];
};

// In order of memory, for those who come back.
template <typename Mapping, typename Step>
FASTBN_DEVICE void gather(const Mapping& mapping, const Items& items, Step& step) {
  mapping.template for_each<Mapping::kOccupancy.loads / Step::kTensors, false>(items, step);
}

// From the end: what was read last is still in the cache.
template <typename Mapping, typename Step>
FASTBN_DEVICE void apply(const Mapping& mapping, const Items& items, const Step& step) {
  mapping.template for_each<Mapping::kOccupancy.loads / Step::kTensors, true>(items, step);
}

// Of a stage.
template <typename Mapping, typename Step>
FASTBN_DEVICE void take_held(const Mapping& mapping, const Items& items, unsigned char* held,
                             Step& step) {
  mapping.template for_each_held<kHeldVectors / Step::kTensors>(items, held, step);
}

}  // namespace fastbn::cuda
