// SPDX-License-Identifier: BSD-3-Clause
//
// The steps that every algorithm has in common: gathering from a part, and applying coefficients to
// it. What a fused operation adds to batch norm goes through its epilogue, here alone.
#pragma once

#include <type_traits>

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
#pragma unroll
  for (int lane = 0; lane < Mapping::kLanes; ++lane) {
    lanes[lane] = mapping.active() ? array[mapping.channel_of(lane)] : 0;
  }
}

// Shifted sums of the part's elements of x, as moments with means counted from `reference`, an
// array of the slab's channels.
template <typename Mapping>
FASTBN_DEVICE Moments<typename Mapping::acc_t, Mapping::kLanes> gather_moments(
    const Mapping& mapping, const Activation& x, const typename Mapping::acc_t* reference) {
  using acc_t = typename Mapping::acc_t;
  ShiftedSums<acc_t, Mapping::kLanes> sums;
  mapping.template for_each<Mapping::kOccupancy.loads, false>([&](const auto& chunk) {
    acc_t values[std::decay_t<decltype(chunk)>::kValues];
    chunk.template load<gpu::Reuse::kLikely>(x, values);
    sums.add(values);
  });
  acc_t origin[Mapping::kLanes];
  load_lanes(mapping, reference, origin);
  return sums.moments(origin);
}

// y of the part's elements, from its end: what was read last is still in the cache.
template <typename Mapping, typename Epilogue>
FASTBN_DEVICE void normalise(const Mapping& mapping, const Activation& x, const Activation& y,
                             const typename Mapping::acc_t* coefficients, int slab_channels,
                             const Epilogue& epilogue) {
  using acc_t = typename Mapping::acc_t;
  constexpr int kLanes = Mapping::kLanes;
  acc_t mean[kLanes], scale[kLanes], shift[kLanes];
  load_lanes(mapping, coefficients + kMean * slab_channels, mean);
  load_lanes(mapping, coefficients + kScale * slab_channels, scale);
  load_lanes(mapping, coefficients + kShift * slab_channels, shift);
  mapping.template for_each<Mapping::kOccupancy.loads, true>([&](const auto& chunk) {
    constexpr int kValues = std::decay_t<decltype(chunk)>::kValues;
    acc_t values[kValues];
    chunk.template load<gpu::Reuse::kNone>(x, values);
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const int lane = i % kLanes;
      values[i] = epilogue.forward((values[i] - mean[lane]) * scale[lane] + shift[lane]);
    }
    chunk.store(y, values);
  });
}

// Sums over the part's elements of dy and of dy * (x - mean). With given statistics dx is known at
// once and written on the way, where wanted.
template <typename Mapping, typename Epilogue>
FASTBN_DEVICE GradSums<typename Mapping::acc_t, Mapping::kLanes> gather_gradients(
    const Mapping& mapping, const Backward& op, const typename Mapping::acc_t* coefficients,
    int slab_channels, const Epilogue& epilogue) {
  using acc_t = typename Mapping::acc_t;
  constexpr int kLanes = Mapping::kLanes;
  const bool write_dx = !op.training && op.dx.data != nullptr;
  acc_t mean[kLanes], scale[kLanes];
  load_lanes(mapping, coefficients + kMean * slab_channels, mean);
  load_lanes(mapping, coefficients + kScale * slab_channels, scale);
  GradSums<acc_t, kLanes> sums;
  mapping.template for_each<Mapping::kOccupancy.loads / 2, false>([&](const auto& chunk) {
    constexpr int kValues = std::decay_t<decltype(chunk)>::kValues;
    acc_t dy[kValues], x[kValues];
    chunk.template load<gpu::Reuse::kLikely>(op.dy, dy);
    chunk.template load<gpu::Reuse::kLikely>(op.x, x);
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const int lane = i % kLanes;
      const acc_t centred = x[i] - mean[lane];
      dy[i] = epilogue.backward(dy[i], centred);
      sums.dy[lane] += dy[i];
      sums.dy_xmu[lane] += dy[i] * centred;
      dy[i] *= scale[lane];
    }
    if (write_dx) chunk.store(op.dx, dy);
  });
  return sums;
}

// dx of the part's elements in training, from its end.
template <typename Mapping, typename Epilogue>
FASTBN_DEVICE void differentiate(const Mapping& mapping, const Backward& op,
                                 const typename Mapping::acc_t* coefficients, int slab_channels,
                                 const Epilogue& epilogue) {
  using acc_t = typename Mapping::acc_t;
  constexpr int kLanes = Mapping::kLanes;
  acc_t mean[kLanes], scale[kLanes], slope[kLanes], offset[kLanes];
  load_lanes(mapping, coefficients + kMean * slab_channels, mean);
  load_lanes(mapping, coefficients + kScale * slab_channels, scale);
  load_lanes(mapping, coefficients + kSlope * slab_channels, slope);
  load_lanes(mapping, coefficients + kOffset * slab_channels, offset);
  mapping.template for_each<Mapping::kOccupancy.loads / 2, true>([&](const auto& chunk) {
    constexpr int kValues = std::decay_t<decltype(chunk)>::kValues;
    acc_t dy[kValues], x[kValues];
    chunk.template load<gpu::Reuse::kNone>(op.dy, dy);
    chunk.template load<gpu::Reuse::kNone>(op.x, x);
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const int lane = i % kLanes;
      const acc_t centred = x[i] - mean[lane];
      dy[i] =
          scale[lane] * epilogue.backward(dy[i], centred) + (slope[lane] * centred + offset[lane]);
    }
    chunk.store(op.dx, dy);
  });
}

// dx of the part's elements with given statistics, for those who want nothing else: x is not read.
// An epilogue that looks at x goes through gather_gradients.
template <typename Mapping>
FASTBN_DEVICE void scale_gradient(const Mapping& mapping, const Backward& op,
                                  const typename Mapping::acc_t* coefficients, int slab_channels) {
  using acc_t = typename Mapping::acc_t;
  constexpr int kLanes = Mapping::kLanes;
  acc_t scale[kLanes];
  load_lanes(mapping, coefficients + kScale * slab_channels, scale);
  mapping.template for_each<Mapping::kOccupancy.loads, true>([&](const auto& chunk) {
    constexpr int kValues = std::decay_t<decltype(chunk)>::kValues;
    acc_t values[kValues];
    chunk.template load<gpu::Reuse::kNone>(op.dy, values);
#pragma unroll
    for (int i = 0; i < kValues; ++i) values[i] *= scale[i % kLanes];
    chunk.store(op.dx, values);
  });
}

}  // namespace fastbn::cuda
