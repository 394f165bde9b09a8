// SPDX-License-Identifier: BSD-3-Clause
//
// Values per channel: reading and writing vectors of any dtype, and the quantities that threads
// gather and merge.
#pragma once

#include <cstdint>

#include "../../problem.h"
#include "../geometry.h"
#include "gpu.cuh"

namespace fastbn::cuda {

template <typename scalar_t>
struct Accumulate {
  using Type = float;
};
template <>
struct Accumulate<double> {
  using Type = double;
};
// The type of sums and saved statistics: float64 for float64, float32 for everything else.
template <typename scalar_t>
using AccumulateOf = typename Accumulate<scalar_t>::Type;

FASTBN_DEVICE uint32_t divide(uint32_t dividend, const Divider& by) {
  const uint32_t high = static_cast<uint32_t>((uint64_t{dividend} * by.multiplier) >> 32);
  return (high + dividend) >> by.shift;
}

// Some of a slab's items, from one to before another.
struct Items {
  int64_t begin, end;

  FASTBN_DEVICE int count() const { return static_cast<int>(end - begin); }
};

// Those of a part.
FASTBN_DEVICE Items part_items(const Geometry& geometry, int part) {
  return {geometry.items * part / geometry.parts, geometry.items * (part + 1) / geometry.parts};
}

// --- Vectors of channels -------------------------------------------------------------------------

FASTBN_DEVICE double read(const ChannelVector& vector, int64_t channel) {
  const int64_t element = channel * vector.stride;
  switch (vector.dtype) {
    case DType::kFloat64:
      return gpu::load_written(static_cast<const double*>(vector.data) + element);
    case DType::kFloat32:
      return gpu::load_written(static_cast<const float*>(vector.data) + element);
    case DType::kBFloat16:
      return gpu::widen(gpu::load_written(static_cast<const BFloat16*>(vector.data) + element));
    default:
      return gpu::widen(gpu::load_written(static_cast<const Float16*>(vector.data) + element));
  }
}

FASTBN_DEVICE double read_or(const ChannelVector& vector, int64_t channel, double absent) {
  return vector.data == nullptr ? absent : read(vector, channel);
}

template <typename scalar_t>
FASTBN_DEVICE void write_narrow(void* data, int64_t element, double value) {
  const float wide[1] = {static_cast<float>(value)};
  scalar_t rounded[1];
  gpu::narrow(wide, rounded);
  gpu::store<gpu::Reuse::kLikely>(static_cast<scalar_t*>(data) + element, rounded[0]);
}

FASTBN_DEVICE void write(const ChannelVector& vector, int64_t channel, double value) {
  const int64_t element = channel * vector.stride;
  switch (vector.dtype) {
    case DType::kFloat64:
      return gpu::store<gpu::Reuse::kLikely>(static_cast<double*>(vector.data) + element, value);
    case DType::kFloat32:
      return write_narrow<float>(vector.data, element, value);
    case DType::kBFloat16:
      return write_narrow<BFloat16>(vector.data, element, value);
    default:
      return write_narrow<Float16>(vector.data, element, value);
  }
}

// --- What threads gather -------------------------------------------------------------------------

// Number of values, and for each of `kLanes` channels their mean and the sum of their squared
// deviations from it.
template <typename acc_t, int kLanes>
struct Moments {
  static constexpr int kFields = 3;
  using Lane = Moments<acc_t, 1>;

  acc_t count = 0;
  acc_t mean[kLanes] = {};
  acc_t m2[kLanes] = {};

  // Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
  // variances", 1979.
  FASTBN_DEVICE void merge(const Moments& other) {
    if (other.count == 0) return;
    const acc_t total = count + other.count;
    const acc_t share = other.count / total;
    const acc_t weight = count * share;
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      const acc_t delta = other.mean[lane] - mean[lane];
      mean[lane] += delta * share;
      m2[lane] += other.m2[lane] + delta * delta * weight;
    }
    count = total;
  }

  FASTBN_DEVICE Lane lane(int index) const { return {count, {mean[index]}, {m2[index]}}; }

  FASTBN_DEVICE void fields(acc_t (&to)[kFields]) const {
    static_assert(kLanes == 1);
    to[0] = count;
    to[1] = mean[0];
    to[2] = m2[0];
  }
  FASTBN_DEVICE static Moments from(const acc_t (&fields)[kFields]) {
    static_assert(kLanes == 1);
    return {fields[0], {fields[1]}, {fields[2]}};
  }
};

// Moments of a channel whose mean is counted from a value of its own, near it.
template <typename acc_t>
struct LocatedMoments {
  static constexpr int kFields = 4;

  Moments<acc_t, 1> moments;
  acc_t reference = 0;

  FASTBN_DEVICE void merge(const LocatedMoments& other) {
    if (moments.count == 0) reference = other.reference;
    Moments<acc_t, 1> moved = other.moments;
    moved.mean[0] += other.reference - reference;
    moments.merge(moved);
  }

  FASTBN_DEVICE void fields(acc_t (&to)[kFields]) const {
    to[0] = moments.count;
    to[1] = moments.mean[0];
    to[2] = moments.m2[0];
    to[3] = reference;
  }
  FASTBN_DEVICE static LocatedMoments from(const acc_t (&fields)[kFields]) {
    return {{fields[0], {fields[1]}, {fields[2]}}, fields[3]};
  }
};

// For each of `kLanes` channels the sums of dy and of dy * (x - mean).
template <typename acc_t, int kLanes>
struct GradSums {
  static constexpr int kFields = 2;
  using Lane = GradSums<acc_t, 1>;

  acc_t dy[kLanes] = {};
  acc_t dy_xmu[kLanes] = {};

  FASTBN_DEVICE void merge(const GradSums& other) {
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      dy[lane] += other.dy[lane];
      dy_xmu[lane] += other.dy_xmu[lane];
    }
  }

  FASTBN_DEVICE Lane lane(int index) const { return {{dy[index]}, {dy_xmu[index]}}; }

  FASTBN_DEVICE void fields(acc_t (&to)[kFields]) const {
    static_assert(kLanes == 1);
    to[0] = dy[0];
    to[1] = dy_xmu[0];
  }
  FASTBN_DEVICE static GradSums from(const acc_t (&fields)[kFields]) {
    static_assert(kLanes == 1);
    return {{fields[0]}, {fields[1]}};
  }
};

// Sums of values less a shift near them, the first that a thread sees: three operations per value
// and no division. What is lost when the squares are centred is at most as many epsilons as this
// thread has values, and that only where the first is an outlier.
template <typename acc_t, int kLanes>
class ShiftedSums {
 public:
  // `values` holds whole groups of kLanes, a value for each.
  template <int kValues>
  FASTBN_DEVICE void add(const acc_t (&values)[kValues]) {
    static_assert(kValues % kLanes == 0);
    if (count_ == 0) {
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) shift_[lane] = values[lane];
    }
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const acc_t deviation = values[i] - shift_[i % kLanes];
      sum_[i % kLanes] += deviation;
      square_[i % kLanes] += deviation * deviation;
    }
    count_ += kValues / kLanes;
  }

  // With means counted from `reference`, a value of each channel that all threads agree on: means
  // of values that lie far from zero would lose the digits by which they differ.
  FASTBN_DEVICE Moments<acc_t, kLanes> moments(const acc_t (&reference)[kLanes]) const {
    Moments<acc_t, kLanes> moments;
    if (count_ == 0) return moments;
    moments.count = static_cast<acc_t>(count_);
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      const acc_t mean = sum_[lane] / moments.count;
      const acc_t m2 = square_[lane] - sum_[lane] * mean;
      moments.mean[lane] = (shift_[lane] - reference[lane]) + mean;
      moments.m2[lane] = m2 < 0 ? acc_t{0} : m2;  // keeps NaN
    }
    return moments;
  }

 private:
  int count_ = 0;
  acc_t shift_[kLanes] = {};
  acc_t sum_[kLanes] = {};
  acc_t square_[kLanes] = {};
};

}  // namespace fastbn::cuda
