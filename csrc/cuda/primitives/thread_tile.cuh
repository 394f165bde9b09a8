// SPDX-License-Identifier: BSD-3-Clause
//
// Elements that a thread takes at once: some vectors of some elements each, the same places in each
// of several activations; and spans of elements that the copy engine takes at once.
#pragma once

#include <cstdint>

#include "../../core/problem.h"
#include "../gpu/async_copy.cuh"
#include "../gpu/intrinsics.cuh"

namespace fastbn::cuda {

// `Places` gives the address of vector `v` in an activation: offset(activation, v), in elements.
template <typename scalar_t, int kVectors_, int kWidth_, typename Places>
struct ThreadTile {
  using acc_t = acc_type<scalar_t>;
  static constexpr int kVectors = kVectors_;
  static constexpr int kWidth = kWidth_;
  static constexpr int kValues = kVectors * kWidth;

  Places places;

  using Vector = gpu::Vector<scalar_t, kWidth>;

  // Values of the kTensor-th activation that the kernel reads. All vectors are on their way before
  // the first is needed.
  template <gpu::CacheHint kHint, int kTensor = 0>
  FASTBN_DEVICE void load(const InputActivation& from, acc_t (&values)[kValues]) const {
    Vector vectors[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) vectors[v] = gpu::load<kHint>(address(from, v));
    widen(vectors, values);
  }

  FASTBN_DEVICE void store(const OutputActivation& to, const acc_t (&values)[kValues]) const {
    scalar_t* data = static_cast<scalar_t*>(to.data);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      acc_t wide[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) wide[i] = values[v * kWidth + i];
      Vector vector;
      gpu::narrow(wide, vector.elements);
      gpu::store<gpu::CacheHint::kStream>(reinterpret_cast<Vector*>(data + places.offset(to, v)),
                                          vector);
    }
  }

 protected:
  FASTBN_DEVICE const Vector* address(const InputActivation& from, int vector) const {
    const scalar_t* data = static_cast<const scalar_t*>(from.data);
    return reinterpret_cast<const Vector*>(data + places.offset(from, vector));
  }

  FASTBN_DEVICE static void widen(const Vector (&vectors)[kVectors], acc_t (&values)[kValues]) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      values[i] = gpu::widen(vectors[i / kWidth].elements[i % kWidth]);
    }
  }
};

// A thread tile in shared memory, or on its way there: vector `v` of the first activation is at
// smem + v * step, those of the next activation are tile_bytes further.
template <typename scalar_t, int kVectors, int kWidth, typename Places>
struct SmemThreadTile : ThreadTile<scalar_t, kVectors, kWidth, Places> {
  using Base = ThreadTile<scalar_t, kVectors, kWidth, Places>;
  using typename Base::acc_t;
  using typename Base::Vector;

  unsigned char* smem;
  int step;
  int tile_bytes;

  FASTBN_DEVICE SmemThreadTile(const Places& places, unsigned char* smem, int step, int tile_bytes)
      : Base{places}, smem(smem), step(step), tile_bytes(tile_bytes) {}

  template <gpu::CacheHint, int kTensor = 0>
  FASTBN_DEVICE void load(const InputActivation&, acc_t (&values)[Base::kValues]) const {
    Vector vectors[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      vectors[v] = *reinterpret_cast<const Vector*>(place(v, kTensor));
    }
    Base::widen(vectors, values);
  }

  // Starts to copy from global memory what load() is going to find.
  FASTBN_DEVICE void copy(int tensor, const InputActivation& from) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      gpu::copy_async(place(v, tensor), Base::address(from, v));
    }
  }

 private:
  FASTBN_DEVICE unsigned char* place(int vector, int tensor) const {
    return smem + tensor * tile_bytes + vector * step;
  }
};

// Adjacent elements that are copied at once: where they begin in an activation, counted in
// elements, where in a tile, counted in bytes, and how many bytes they are.
struct BulkSpan {
  int64_t offset;
  int place;
  int bytes;
};

// Vectors equally far apart, in every activation alike.
struct EvenPlaces {
  int64_t first;
  int64_t step;

  template <typename Data>
  FASTBN_DEVICE int64_t offset(const Activation<Data>&, int vector) const {
    return first + vector * step;
  }
};

// Vectors anywhere, in every activation alike.
template <int kVectors>
struct ListedPlaces {
  int64_t offsets[kVectors];

  template <typename Data>
  FASTBN_DEVICE int64_t offset(const Activation<Data>&, int vector) const {
    return offsets[vector];
  }
};

}  // namespace fastbn::cuda
