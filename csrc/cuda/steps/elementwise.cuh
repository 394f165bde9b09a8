// SPDX-License-Identifier: BSD-3-Clause
//
// The steps that take elements: reductions to statistics and to the sums that gradients take, and
// those that apply finalized coefficients.
#pragma once

#include "../layouts/mapping.cuh"
#include "epilogue.cuh"
#include "finalize.cuh"

namespace fastbn::cuda {

// What training reads: a step's load<..., kTensor>() is of the kTensor-th of these.
template <EpilogueKind kKind>
constexpr int kForwardInputs = kKind == EpilogueKind::kResidual ? 2 : 1;
template <EpilogueKind kKind>
constexpr int kBackwardInputs = kKind == EpilogueKind::kResidual ? 3 : 2;
template <EpilogueKind kKind>
FASTBN_HOST_DEVICE Inputs<kForwardInputs<kKind>> inputs(const TrainingForward& op) {
  if constexpr (kKind == EpilogueKind::kResidual) return {{&op.x, &op.epilogue.residual}};
  return {{&op.x}};
}
template <EpilogueKind kKind>
FASTBN_HOST_DEVICE Inputs<kBackwardInputs<kKind>> inputs(const Backward& op) {
  if constexpr (kKind == EpilogueKind::kResidual) return {{&op.dy, &op.x, &op.epilogue.residual}};
  return {{&op.dy, &op.x}};
}

// Among how many a thread shares out the vectors that it can hold: the tensors that a step reads
// and, if it computes it, the pre-activation.
template <EpilogueKind kKind>
FASTBN_HOST_DEVICE constexpr int shares(int tensors) {
  return tensors + computes_z(kKind);
}

// The number of each lane of a thread, from an array of the channel tile's channels.
template <typename Mapping>
FASTBN_DEVICE void load_lanes(const Mapping& mapping, const typename Mapping::acc_t* array,
                              typename Mapping::acc_t (&lanes)[Mapping::kLanes]) {
  mapping.for_each_lane(
      [&](int lane, int channel) { lanes[lane] = mapping.active() ? array[channel] : 0; });
}

// What batch norm alone computes: the pre-activation, without a residual.
template <typename acc_t>
FASTBN_DEVICE acc_t normalize(acc_t x, acc_t mean, acc_t scale, acc_t shift) {
  return (x - mean) * scale + shift;
}

// --- Reduce --------------------------------------------------------------------------------------

// Reduces x to its moments.
template <typename Mapping>
class ReduceStats {
 public:
  using acc_t = typename Mapping::acc_t;
  static constexpr int kTensors = 1;
  static constexpr int kShares = kTensors;
  static constexpr bool kWholeVectors = false;

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

// Turns dy into the gradient of the pre-activation, which it is already where there is no epilogue.
template <typename Mapping, EpilogueKind kKind>
class PreActivationGradient {
 public:
  using acc_t = typename Mapping::acc_t;
  static constexpr bool kHasResidual = kKind == EpilogueKind::kResidual;

  FASTBN_DEVICE PreActivationGradient(const Mapping& mapping, const Backward& op,
                                      const ChannelRecords<acc_t>& records)
      : epilogue_(op.epilogue) {
    load_lanes(mapping, records.array(kShiftPlace), shift_);
  }

  template <gpu::CacheHint kHint, typename Tile>
  FASTBN_DEVICE void operator()(const Tile& tile, const acc_t (&x)[Tile::kValues],
                                const acc_t (&mean)[Mapping::kLanes],
                                const acc_t (&scale)[Mapping::kLanes],
                                acc_t (&dy)[Tile::kValues]) const {
    acc_t z[Tile::kValues];
    [[maybe_unused]] acc_t residual[Tile::kValues];
    if constexpr (kHasResidual) tile.template load<kHint, 2>(epilogue_.residual, residual);
#pragma unroll
    for (int i = 0; i < Tile::kValues; ++i) {
      const int lane = i % Mapping::kLanes;
      z[i] = normalize(x[i], mean[lane], scale[lane], shift_[lane]);
      if constexpr (kHasResidual) z[i] += residual[i];
    }
    differentiate<typename Mapping::scalar_t>(epilogue_, z);
    // What the thread does not have may be anything, and the derivative there none. Where a
    // function is flat no dy gets through, not even an infinite one.
#pragma unroll
    for (int i = 0; i < Tile::kValues; ++i) {
      dy[i] = tile.has(i) && z[i] != 0 ? dy[i] * z[i] : 0;
    }
  }

 private:
  const Epilogue& epilogue_;
  acc_t shift_[Mapping::kLanes];
};
template <typename Mapping>
class PreActivationGradient<Mapping, EpilogueKind::kNone> {
 public:
  using acc_t = typename Mapping::acc_t;

  FASTBN_DEVICE PreActivationGradient(const Mapping&, const Backward&,
                                      const ChannelRecords<acc_t>&) {}

  template <gpu::CacheHint, typename Tile>
  FASTBN_DEVICE void operator()(const Tile&, const acc_t (&)[Tile::kValues],
                                const acc_t (&)[Mapping::kLanes], const acc_t (&)[Mapping::kLanes],
                                acc_t (&)[Tile::kValues]) const {}
};

template <typename Mapping>
class PreActivationGradient<Mapping, EpilogueKind::kMask> {
 public:
  using acc_t = typename Mapping::acc_t;

  FASTBN_DEVICE PreActivationGradient(const Mapping&, const Backward& op,
                                      const ChannelRecords<acc_t>&)
      : mask_(op.epilogue.mask),
        slope_(static_cast<acc_t>(other_slope(op.epilogue.function, op.epilogue.parameter))) {}

  template <gpu::CacheHint kHint, typename Tile>
  FASTBN_DEVICE void operator()(const Tile& tile, const acc_t (&)[Tile::kValues],
                                const acc_t (&)[Mapping::kLanes], const acc_t (&)[Mapping::kLanes],
                                acc_t (&dy)[Tile::kValues]) const {
    uint8_t bytes[Tile::kVectors];
    tile.template load_mask<kHint>(mask_, bytes);
#pragma unroll
    for (int i = 0; i < Tile::kValues; ++i) {
      const acc_t otherwise = slope_ != 0 ? dy[i] * slope_ : 0;
      dy[i] = bytes[i / Tile::kWidth] >> i % Tile::kWidth & 1 ? dy[i] : otherwise;
    }
  }

 private:
  const uint8_t* mask_;
  const acc_t slope_;  // where it is not 1
};

// What backward leaves behind while it reduces.
enum class OnTheWay {
  kNothing,
  kDx,  // with given statistics it is known at once
  // The gradient of the pre-activation, for whoever applies: in the place of dy where this is in
  // shared memory, else in that of dx.
  kGradient,
};

// Reduces dy and x to the sums of dy and of dy * (x - mean), where with an epilogue dy is the
// gradient of the pre-activation. That is also written to where it is wanted.
template <typename Mapping, EpilogueKind kKind, OnTheWay kOnTheWay>
class ReduceGrad {
 public:
  using acc_t = typename Mapping::acc_t;
  static constexpr int kLanes = Mapping::kLanes;
  static constexpr int kTensors = kBackwardInputs<kKind>;
  static constexpr int kShares = shares<kKind>(kTensors);
  static constexpr bool kWholeVectors = kKind == EpilogueKind::kMask;
  static constexpr bool kHasEpilogue = kKind != EpilogueKind::kNone;
  static constexpr bool kWriteDx = kOnTheWay == OnTheWay::kDx;

  FASTBN_DEVICE ReduceGrad(const Mapping& mapping, const Backward& op,
                           const ChannelRecords<acc_t>& records)
      : op_(op), gradient_(mapping, op, records) {
    load_lanes(mapping, records.array(&GradInputs<acc_t>::mean), mean_);
    if (kWriteDx || computes_z(kKind)) {
      load_lanes(mapping, records.array(&GradInputs<acc_t>::scale), scale_);
    }
  }

  template <typename Tile>
  FASTBN_DEVICE void operator()(const Tile& tile) {
    acc_t dy[Tile::kValues], x[Tile::kValues];
    tile.template load<gpu::CacheHint::kKeep, 0>(op_.dy, dy);
    tile.template load<gpu::CacheHint::kKeep, 1>(op_.x, x);
    gradient_.template operator()<gpu::CacheHint::kKeep>(tile, x, mean_, scale_, dy);
    if constexpr (kHasEpilogue) leave_gradient(tile, dy);
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
  template <typename Tile>
  FASTBN_DEVICE void leave_gradient(const Tile& tile,
                                    const acc_t (&gradient)[Tile::kValues]) const {
    constexpr bool kIsApplied = kOnTheWay == OnTheWay::kGradient;
    if constexpr (kIsApplied && Tile::kInSmem) tile.keep(gradient);
    if (op_.dresidual.data != nullptr) {
      tile.store(op_.dresidual, gradient);
    } else if (kIsApplied && !Tile::kInSmem) {
      tile.store(op_.dx, gradient);
    }
  }

  const Backward& op_;
  const PreActivationGradient<Mapping, kKind> gradient_;
  acc_t mean_[kLanes], scale_[kLanes];
  GradSums<acc_t, kLanes> sums_;
};

// Reduces a range in order of memory, with kLoads vectors in flight: whoever comes back meets the
// end of it in the cache.
template <int kLoads, typename Mapping, typename Step>
FASTBN_DEVICE void reduce(const Mapping& mapping, const Range& range, Step& step) {
  constexpr int kVectors = vectors_of_each(kLoads, Step::kShares);
  mapping.template for_each<kVectors, false>(range, step);
}

// --- Apply ---------------------------------------------------------------------------------------

// Writes y. Forward is TrainingForward or EvalForward.
template <typename Mapping, EpilogueKind kKind, typename Forward>
class ApplyForward {
 public:
  using acc_t = typename Mapping::acc_t;
  static constexpr int kLanes = Mapping::kLanes;
  static constexpr int kTensors = kForwardInputs<kKind>;
  static constexpr bool kHasResidual = kKind == EpilogueKind::kResidual;
  static constexpr int kShares = shares<kKind>(kTensors);
  static constexpr bool kWholeVectors = kKind == EpilogueKind::kMask;

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
    [[maybe_unused]] acc_t residual[Tile::kValues];
    if constexpr (kHasResidual) {
      tile.template load<gpu::CacheHint::kStream, 1>(op_.epilogue.residual, residual);
    }
#pragma unroll
    for (int i = 0; i < Tile::kValues; ++i) {
      const int lane = i % kLanes;
      values[i] = normalize(values[i], mean_[lane], scale_[lane], shift_[lane]);
      if constexpr (kHasResidual) values[i] += residual[i];
    }
    if constexpr (kHasResidual && Tile::kIsMasked) {
      if (op_.epilogue.mask_out != nullptr) {
        leave_mask<typename Mapping::scalar_t>(tile, op_.epilogue, values);
      }
    }
    if constexpr (kKind != EpilogueKind::kNone) activate(op_.epilogue, values);
    tile.store(op_.y, values);
  }

 private:
  const Forward& op_;
  acc_t mean_[kLanes], scale_[kLanes], shift_[kLanes];
};

// Writes dx in training, from `dy` in the place of the operation's.
template <typename Mapping, EpilogueKind kKind, gpu::CacheHint kDyHint = gpu::CacheHint::kStream>
class ApplyBackward {
 public:
  using acc_t = typename Mapping::acc_t;
  static constexpr int kLanes = Mapping::kLanes;
  static constexpr int kTensors = kBackwardInputs<kKind>;
  static constexpr int kShares = shares<kKind>(kTensors);
  static constexpr bool kWholeVectors = kKind == EpilogueKind::kMask;

  FASTBN_DEVICE ApplyBackward(const Mapping& mapping, const Backward& op, const InputActivation& dy,
                              const ChannelRecords<acc_t>& records)
      : op_(op), dy_(dy), gradient_(mapping, op, records) {
    load_lanes(mapping, records.array(&GradAffine<acc_t>::mean), mean_);
    load_lanes(mapping, records.array(&GradAffine<acc_t>::scale), scale_);
    load_lanes(mapping, records.array(&GradAffine<acc_t>::slope), slope_);
    load_lanes(mapping, records.array(&GradAffine<acc_t>::offset), offset_);
  }

  template <typename Tile>
  FASTBN_DEVICE void operator()(const Tile& tile) const {
    acc_t dy[Tile::kValues], x[Tile::kValues];
    tile.template load<kDyHint, 0>(dy_, dy);
    tile.template load<gpu::CacheHint::kStream, 1>(op_.x, x);
    gradient_.template operator()<gpu::CacheHint::kStream>(tile, x, mean_, scale_, dy);
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
  const InputActivation& dy_;
  const PreActivationGradient<Mapping, kKind> gradient_;
  acc_t mean_[kLanes], scale_[kLanes], slope_[kLanes], offset_[kLanes];
};

// Writes dx with given statistics, where nothing else is wanted: x is not read.
template <typename Mapping>
class ApplyBackwardEval {
 public:
  using acc_t = typename Mapping::acc_t;
  static constexpr int kTensors = 1;
  static constexpr int kShares = kTensors;
  static constexpr bool kWholeVectors = false;

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

// Applies to a range from its end, where what was read last is still in the cache, with kLoads
// vectors in flight.
template <int kLoads, typename Mapping, typename Step>
FASTBN_DEVICE void apply(const Mapping& mapping, const Range& range, const Step& step) {
  constexpr int kVectors = vectors_of_each(kLoads, Step::kShares);
  mapping.template for_each<kVectors, true>(range, step);
}

}  // namespace fastbn::cuda
