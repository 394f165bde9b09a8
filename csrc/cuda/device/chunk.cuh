// SPDX-License-Identifier: BSD-3-Clause
//
// Elements that a thread takes at once: some vectors of some elements each, the same places in each
// of several activations; and runs of elements that are copied at once.
#pragma once

#include <cstdint>

#include "copies.cuh"
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

  using Vector = gpu::Vector<scalar_t, kWidth>;

  // Values of the kTensor-th activation that the kernel reads. All vectors are on their way before
  // the first is needed.
  template <gpu::Reuse kReuse, int kTensor = 0>
  FASTBN_DEVICE void load(const Activation& from, acc_t (&values)[kValues]) const {
    Vector vectors[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) vectors[v] = gpu::load<kReuse>(address(from, v));
    widen(vectors, values);
  }

  FASTBN_DEVICE void store(const Activation& to, const acc_t (&values)[kValues]) const {
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

 protected:
  FASTBN_DEVICE const Vector* address(const Activation& from, int vector) const {
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

// Elements that reside in shared memory, or are on their way there: vector `v` of the first
// activation at held + v * step, those of the next one a stage further.
template <typename scalar_t, int kVectors, int kWidth, typename Places>
struct HeldChunk : Chunk<scalar_t, kVectors, kWidth, Places> {
  using Base = Chunk<scalar_t, kVectors, kWidth, Places>;
  using typename Base::acc_t;
  using typename Base::Vector;

  unsigned char* held;
  int step;
  int stage_bytes;

  FASTBN_DEVICE HeldChunk(const Places& places, unsigned char* held, int step, int stage_bytes)
      : Base{places}, held(held), step(step), stage_bytes(stage_bytes) {}

  template <gpu::Reuse, int kTensor = 0>
  FASTBN_DEVICE void load(const Activation&, acc_t (&values)[Base::kValues]) const {
    Vector vectors[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      vectors[v] = *reinterpret_cast<const Vector*>(place(v, kTensor));
    }
    Base::widen(vectors, values);
  }

  // Starts to copy what load() is going to find.
  template <int kTensor>
  FASTBN_DEVICE void copy(const Activation& from) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      gpu::copy_async(place(v, kTensor), Base::address(from, v));
    }
  }

 private:
  FASTBN_DEVICE unsigned char* place(int vector, int tensor) const {
    return held + tensor * stage_bytes + vector * step;
  }
};

// Elements one after another: where they begin in an activation, counted in elements, where in a
// stage, counted in bytes, and how many bytes they are.
struct Run {
  int64_t offset;
  int place;
  int bytes;
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
