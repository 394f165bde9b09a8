// SPDX-License-Identifier: BSD-3-Clause
//
// Elements that a thread takes at once: some vectors of some elements each, the same places in each
// of several activations; and spans of elements that the copy engine takes at once.
#pragma once

#include <cstdint>

#include "../../core/mask.h"
#include "../../core/problem.h"
#include "../gpu/async_copy.cuh"
#include "../gpu/intrinsics.cuh"

namespace fastbn::cuda {

// The activations that a kernel reads.
template <int kTensors>
struct Inputs {
  const InputActivation* tensors[kTensors];
};

// Vectors by their numbers, counted from the first of every activation alike.
template <int kVectors, int kWidth>
struct NumberedPlaces {
  uint32_t numbers[kVectors];

  template <typename Data>
  FASTBN_DEVICE int64_t offset(const Activation<Data>&, int vector) const {
    return int64_t{numbers[vector]} * kWidth;
  }
};

// `Places` gives the address of vector `v` in an activation: offset(activation, v), in elements.
template <typename scalar_t, int kVectors_, int kWidth_,
          typename Places = NumberedPlaces<kVectors_, kWidth_>>
struct ThreadTile {
  using acc_t = acc_type<scalar_t>;
  static constexpr int kVectors = kVectors_;
  static constexpr int kWidth = kWidth_;
  static constexpr int kValues = kVectors * kWidth;
  static constexpr bool kInSmem = false;
  // Whether its vectors are those that bytes of masks are for.
  static constexpr bool kIsMasked = kWidth * sizeof(scalar_t) == kMaskedBytes;

  Places places;

  using Vector = gpu::Vector<scalar_t, kWidth>;

  // Whether the thread has the i-th value, and how many it has.
  FASTBN_DEVICE static constexpr bool has(int) { return true; }
  FASTBN_DEVICE static constexpr int count() { return kValues; }

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
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      gpu::store<gpu::CacheHint::kStream>(address(to, v), narrow(values, v));
    }
  }

  // The bytes of a mask for the vectors.
  template <gpu::CacheHint kHint>
  FASTBN_DEVICE void load_mask(const uint8_t* mask, uint8_t (&bytes)[kVectors]) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) bytes[v] = gpu::load<kHint>(mask + places.numbers[v]);
  }
  FASTBN_DEVICE void store_mask(uint8_t* mask, int vector, uint8_t byte) const {
    gpu::store<gpu::CacheHint::kStream>(mask + places.numbers[vector], byte);
  }

 protected:
  FASTBN_DEVICE const Vector* address(const InputActivation& from, int vector) const {
    const scalar_t* data = static_cast<const scalar_t*>(from.data);
    return reinterpret_cast<const Vector*>(data + places.offset(from, vector));
  }
  FASTBN_DEVICE Vector* address(const OutputActivation& to, int vector) const {
    scalar_t* data = static_cast<scalar_t*>(to.data);
    return reinterpret_cast<Vector*>(data + places.offset(to, vector));
  }

  FASTBN_DEVICE static void widen(const Vector (&vectors)[kVectors], acc_t (&values)[kValues]) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      acc_t wide[kWidth];
      gpu::widen(vectors[v].elements, wide);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) values[v * kWidth + i] = wide[i];
    }
  }
  FASTBN_DEVICE static Vector narrow(const acc_t (&values)[kValues], int vector) {
    acc_t wide[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) wide[i] = values[vector * kWidth + i];
    Vector narrowed;
    gpu::narrow(wide, narrowed.elements);
    return narrowed;
  }
};

// Aligned vectors of whose elements the thread may have only some: those in between it reads, too,
// and leaves alone.
template <typename scalar_t, int kVectors, int kWidth>
struct PartialThreadTile : ThreadTile<scalar_t, kVectors, kWidth> {
  using Base = ThreadTile<scalar_t, kVectors, kWidth>;
  using typename Base::acc_t;
  using typename Base::Vector;
  static constexpr bool kIsMasked = false;
  static constexpr unsigned kAll = (1u << kWidth) - 1;

  unsigned masks[kVectors];  // a bit for each element that the thread has
  int64_t elements;          // of an activation: the last vector may reach beyond

  FASTBN_DEVICE bool has(int value) const { return masks[value / kWidth] >> value % kWidth & 1; }
  FASTBN_DEVICE int count() const {
    int count = 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) count += gpu::count_bits(masks[v]);
    return count;
  }

  // Values that the thread does not have are zero.
  template <gpu::CacheHint kHint, int kTensor = 0>
  FASTBN_DEVICE void load(const InputActivation& from, acc_t (&values)[Base::kValues]) const {
    Vector vectors[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      vectors[v] = {};
      if (Base::places.offset(from, v) + kWidth <= elements) {
        if (masks[v] != 0) vectors[v] = gpu::load<kHint>(Base::address(from, v));
      } else {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          if (has(v * kWidth + i)) {
            vectors[v].elements[i] = gpu::load<kHint>(Base::address(from, v)->elements + i);
          }
        }
      }
    }
    Base::widen(vectors, values);
#pragma unroll
    for (int i = 0; i < Base::kValues; ++i) values[i] = has(i) ? values[i] : 0;
  }

  FASTBN_DEVICE void store(const OutputActivation& to, const acc_t (&values)[Base::kValues]) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const Vector vector = Base::narrow(values, v);
      if (masks[v] == kAll) {
        gpu::store<gpu::CacheHint::kStream>(Base::address(to, v), vector);
        continue;
      }
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        if (has(v * kWidth + i)) {
          gpu::store<gpu::CacheHint::kStream>(Base::address(to, v)->elements + i,
                                              vector.elements[i]);
        }
      }
    }
  }
};

// A thread tile in shared memory, or on its way there: vector `v` of the first activation is at
// smem + v * step, those of the next activation are tile_bytes further. Results go to memory or, if
// kInPlace, to where the first activation is.
template <typename scalar_t, int kVectors, int kWidth, bool kInPlace>
struct SmemThreadTile : ThreadTile<scalar_t, kVectors, kWidth> {
  using Base = ThreadTile<scalar_t, kVectors, kWidth>;
  using typename Base::acc_t;
  using typename Base::Vector;
  static constexpr bool kInSmem = true;

  unsigned char* smem;
  int step;
  int tile_bytes;

  template <gpu::CacheHint, int kTensor = 0>
  FASTBN_DEVICE void load(const InputActivation&, acc_t (&values)[Base::kValues]) const {
    Vector vectors[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      vectors[v] = gpu::load_shared(reinterpret_cast<const Vector*>(place(v, kTensor)));
    }
    Base::widen(vectors, values);
  }

  FASTBN_DEVICE void store(const OutputActivation& to, const acc_t (&values)[Base::kValues]) const {
    if constexpr (kInPlace) {
      keep(values);
    } else {
      Base::store(to, values);
    }
  }

  // Leaves values in the place of the first activation.
  FASTBN_DEVICE void keep(const acc_t (&values)[Base::kValues]) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      gpu::store_shared(reinterpret_cast<Vector*>(place(v, 0)), Base::narrow(values, v));
    }
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

// A number of vectors, as a type.
template <int kVectors>
struct VectorCount {
  static constexpr int kValue = kVectors;
};

// What take_turns() leaves: fewer than twice kVectors.
template <int kVectors, typename Take>
FASTBN_DEVICE void take_rest(int left, int threads, const Take& take) {
  if (left > (kVectors - 1) * threads) {
    take(VectorCount<kVectors>());
    left -= kVectors * threads;
  }
  if constexpr (kVectors > 1) take_rest<kVectors / 2>(left, threads, take);
}

// Takes vectors in turn with other threads: of `left` that are left the first is this thread's, and
// so is every one that is `threads` further. Calls take(VectorCount): kVectors, a power of two, as
// long as there are as many, then its halves, so that few loads are waited for one after another.
template <int kVectors, typename Take>
FASTBN_DEVICE void take_turns(int left, int threads, const Take& take) {
  static_assert((kVectors & (kVectors - 1)) == 0);
#pragma unroll 1
  for (; left > (kVectors - 1) * threads; left -= kVectors * threads) {
    take(VectorCount<kVectors>());
  }
  if constexpr (kVectors > 1) take_rest<kVectors / 2>(left, threads, take);
}

}  // namespace fastbn::cuda
