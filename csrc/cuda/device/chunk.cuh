// SPDX-License-Identifier: BSD-3-Clause
//
// Elements that a thread takes at once: some vectors of some elements each, the same places in each
// of several activations.
#pragma once

#include <cstdint>

#include "gpu.cuh"
#include "values.cuh"

namespace fastbn::cuda {

// `Places` gives the address of vector `v` in an activation: offset(activation, v), in elements.
template <typename scalar_t, int kVectors_, int kWidth_, typename Places>
struct Chunk {
  using acc_t = AccumulateOf<scalar_t>;
  static constexpr int kVectors = kVectors_;
  static constexpr int kWidth = kWidth_;
  static constexpr int kValues = kVectors * kWidth;

  Places places;

  // All vectors are on their way before the first is needed.
  template <gpu::Reuse kReuse>
  FASTBN_DEVICE void load(const Activation& from, acc_t (&values)[kValues]) const {
    using Vector = gpu::Vector<scalar_t, kWidth>;
    const scalar_t* data = static_cast<const scalar_t*>(from.data);
    Vector vectors[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const scalar_t* address = data + places.offset(from, v);
      vectors[v] = gpu::load<kReuse>(reinterpret_cast<const Vector*>(address));
    }
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      values[i] = gpu::widen(vectors[i / kWidth].elements[i % kWidth]);
    }
  }

  FASTBN_DEVICE void store(const Activation& to, const acc_t (&values)[kValues]) const {
    using Vector = gpu::Vector<scalar_t, kWidth>;
    scalar_t* data = static_cast<scalar_t*>(to.data);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      acc_t wide[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) wide[i] = values[v * kWidth + i];
      Vector vector;
      gpu::narrow(wide, vector.elements);
      gpu::store<gpu::Reuse::kNone>(reinterpret_cast<Vector*>(data + places.offset(to, v)), vector);
    }
  }
};

// Equally far apart, in every activation alike.
struct EvenPlaces {
  int64_t first;
  int64_t step;

  FASTBN_DEVICE int64_t offset(const Activation&, int vector) const {
    return first + vector * step;
  }
};

// Anywhere, in every activation alike.
template <int kVectors>
struct ListedPlaces {
  int64_t offsets[kVectors];

  FASTBN_DEVICE int64_t offset(const Activation&, int vector) const { return offsets[vector]; }
};

}  // namespace fastbn::cuda
