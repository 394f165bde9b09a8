// SPDX-License-Identifier: BSD-3-Clause
//
// Values per channel: reading and writing vectors of any dtype, records of channels in shared
// memory, and the sums that threads take.
#pragma once

#include <cstdint>

#include "../../core/moments.h"
#include "../../core/problem.h"
#include "../geometry.h"
#include "../gpu/intrinsics.cuh"

namespace fastbn::cuda {

FASTBN_DEVICE uint32_t fast_divide(uint32_t dividend, const FastDivmod& by) {
  const uint32_t high = static_cast<uint32_t>((uint64_t{dividend} * by.multiplier) >> 32);
  return (high + dividend) >> by.shift;
}

// Rows, vectors or elements of a channel tile's extent, from one to before another.
struct Range {
  int64_t begin, end;

  FASTBN_DEVICE int count() const { return static_cast<int>(end - begin); }
};

// The range of a split.
FASTBN_DEVICE Range split_range(const Geometry& geometry, int split) {
  return {geometry.extent * split / geometry.splits,
          geometry.extent * (split + 1) / geometry.splits};
}

// --- Vectors of channels -------------------------------------------------------------------------

FASTBN_DEVICE double read(const InputVector& vector, int64_t channel) {
  const int64_t element = channel * vector.stride;
  switch (vector.dtype) {
    case DType::kFloat64:
      return gpu::load_coherent(static_cast<const double*>(vector.data) + element);
    case DType::kFloat32:
      return gpu::load_coherent(static_cast<const float*>(vector.data) + element);
    case DType::kBFloat16:
      return gpu::widen(gpu::load_coherent(static_cast<const BFloat16*>(vector.data) + element));
    default:
      return gpu::widen(gpu::load_coherent(static_cast<const Float16*>(vector.data) + element));
  }
}

FASTBN_DEVICE void prefetch(const InputVector& vector, int64_t channel) {
  if (vector.data == nullptr) return;
  gpu::prefetch(static_cast<const char*>(vector.data) +
                channel * vector.stride * element_size(vector.dtype));
}

FASTBN_DEVICE double read_or(const InputVector& vector, int64_t channel, double absent) {
  return vector.data == nullptr ? absent : read(vector, channel);
}

template <typename scalar_t>
FASTBN_DEVICE void write_narrow(void* data, int64_t element, double value) {
  const float wide[1] = {static_cast<float>(value)};
  scalar_t rounded[1];
  gpu::narrow(wide, rounded);
  gpu::store<gpu::CacheHint::kKeep>(static_cast<scalar_t*>(data) + element, rounded[0]);
}

FASTBN_DEVICE void write(const OutputVector& vector, int64_t channel, double value) {
  const int64_t element = channel * vector.stride;
  switch (vector.dtype) {
    case DType::kFloat64:
      return gpu::store<gpu::CacheHint::kKeep>(static_cast<double*>(vector.data) + element, value);
    case DType::kFloat32:
      return write_narrow<float>(vector.data, element, value);
    case DType::kBFloat16:
      return write_narrow<BFloat16>(vector.data, element, value);
    default:
      return write_narrow<Float16>(vector.data, element, value);
  }
}

// --- Records of a channel ------------------------------------------------------------------------

// The numbers that a record (a struct of acc_t and nothing else) consists of, in order.
template <typename acc_t, typename Record>
constexpr int kNumbers = sizeof(Record) / sizeof(acc_t);

template <typename acc_t, typename Record>
FASTBN_DEVICE acc_t* numbers_of(Record& record) {
  static_assert(sizeof(Record) % sizeof(acc_t) == 0);
  return reinterpret_cast<acc_t*>(&record);
}
template <typename acc_t, typename Record>
FASTBN_DEVICE const acc_t* numbers_of(const Record& record) {
  return numbers_of<acc_t>(const_cast<Record&>(record));
}

// A record of each channel of a channel tile in shared memory: an array for each of its numbers.
template <typename acc_t>
class ChannelRecords {
 public:
  FASTBN_DEVICE ChannelRecords(void* memory, const Geometry& geometry)
      : arrays_(static_cast<acc_t*>(memory)), channels_(geometry.tile_channels) {}

  template <typename Record>
  FASTBN_DEVICE void put(int channel, const Record& record) const {
    static_assert(kNumbers<acc_t, Record> <= kCoefficients);
#pragma unroll
    for (int i = 0; i < kNumbers<acc_t, Record>; ++i) {
      arrays_[i * channels_ + channel] = numbers_of<acc_t>(record)[i];
    }
  }
  template <typename Record>
  FASTBN_DEVICE Record get(int channel) const {
    Record record;
#pragma unroll
    for (int i = 0; i < kNumbers<acc_t, Record>; ++i) {
      numbers_of<acc_t>(record)[i] = arrays_[i * channels_ + channel];
    }
    return record;
  }

  // A number of a channel that lies behind its record.
  FASTBN_DEVICE void put(int place, int channel, acc_t number) const {
    arrays_[place * channels_ + channel] = number;
  }
  FASTBN_DEVICE const acc_t* array(int place) const { return arrays_ + place * channels_; }

  // The array of one member of the records.
  template <typename Record>
  FASTBN_DEVICE const acc_t* array(acc_t Record::* member) const {
    Record record;
    return arrays_ + (&(record.*member) - numbers_of<acc_t>(record)) * channels_;
  }

 private:
  acc_t* arrays_;
  const int& channels_;
};

// --- What threads reduce -------------------------------------------------------------------------

// Moments of a channel whose mean is counted from a value near it, a pivot: means of values that
// lie far from zero would lose the digits by which they differ.
template <typename acc_t>
struct PivotedMoments {
  Moments<acc_t> moments;
  acc_t pivot = 0;

  FASTBN_DEVICE void merge(const PivotedMoments& other) {
    if (moments.count == 0) pivot = other.pivot;
    Moments<acc_t> moved = other.moments;
    moved.mean[0] += other.pivot - pivot;
    moments.merge(moved);
  }
};

// Sums of deviations from a pivot, the first value that a thread sees, and of their squares: three
// operations per value and no division. What is lost when the squares are centered is at most as
// many epsilons as this thread has values, and that only where the first is an outlier.
template <typename acc_t, int kLanes>
class PivotedSums {
 public:
  // `values` are those of a thread tile, in whole groups of kLanes, a value for each.
  template <typename Tile>
  FASTBN_DEVICE void add(const Tile& tile, const acc_t (&values)[Tile::kValues]) {
    static_assert(Tile::kValues % kLanes == 0);
    if (count_ == 0) {
#pragma unroll
      for (int i = Tile::kValues - 1; i >= 0; --i) {
        if (tile.has(i)) pivot_[i % kLanes] = values[i];
      }
    }
#pragma unroll
    for (int i = 0; i < Tile::kValues; ++i) {
      const acc_t deviation = tile.has(i) ? values[i] - pivot_[i % kLanes] : 0;
      sum_[i % kLanes] += deviation;
      square_[i % kLanes] += deviation * deviation;
    }
    count_ += tile.count() / kLanes;
  }

  // The moments of all values, with means counted from `pivot`, a value of each channel that all
  // threads agree on: see PivotedMoments.
  FASTBN_DEVICE Moments<acc_t, kLanes> moments(const acc_t (&pivot)[kLanes]) const {
    Moments<acc_t, kLanes> moments;
    if (count_ == 0) return moments;
    moments.count = static_cast<acc_t>(count_);
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      const acc_t mean = sum_[lane] / moments.count;
      const acc_t m2 = square_[lane] - sum_[lane] * mean;
      moments.mean[lane] = (pivot_[lane] - pivot[lane]) + mean;
      moments.m2[lane] = m2 < 0 ? acc_t{0} : m2;  // keeps NaN
    }
    return moments;
  }

 private:
  int count_ = 0;
  acc_t pivot_[kLanes] = {};
  acc_t sum_[kLanes] = {};
  acc_t square_[kLanes] = {};
};

}  // namespace fastbn::cuda
