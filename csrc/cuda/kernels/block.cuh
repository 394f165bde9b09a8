// SPDX-License-Identifier: BSD-3-Clause
//
// What a block does with its part of a slab, in all algorithms.
#pragma once

#include "../device/reduce.cuh"
#include "elementwise.cuh"

namespace fastbn::cuda {

// The block's shared memory: kCoefficients arrays of the slab's channels, then room to merge.
template <typename acc_t>
struct Shared {
  acc_t* coefficients;
  void* scratch;

  FASTBN_DEVICE explicit Shared(const Geometry& geometry)
      : coefficients(static_cast<acc_t*>(gpu::shared_memory())),
        scratch(coefficients + kCoefficients * geometry.slab_channels) {}

  template <int kCount>
  FASTBN_DEVICE void put(const Geometry& geometry, int channel,
                         const Coefficients<acc_t, kCount>& given) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      coefficients[i * geometry.slab_channels + channel] = given.values[i];
    }
  }
  template <int kCount>
  FASTBN_DEVICE Coefficients<acc_t, kCount> get(const Geometry& geometry, int channel) const {
    Coefficients<acc_t, kCount> found;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      found.values[i] = coefficients[i * geometry.slab_channels + channel];
    }
    return found;
  }
};

// The mapping of a block where nothing resides.
template <typename Mapping>
FASTBN_DEVICE Mapping block_mapping(const Problem& problem, const Geometry& geometry, int block) {
  return Mapping(problem, geometry, block % geometry.slabs, block / geometry.slabs);
}

// Thread `channel` gets the moments of the part's elements of that channel, the mean counted from
// `reference`, which it gets too.
template <typename Mapping, typename acc_t>
FASTBN_DEVICE Moments<acc_t, 1> block_moments(const Mapping& mapping, const Geometry& geometry,
                                              const Activation& x, const Shared<acc_t>& shared,
                                              acc_t& reference) {
  const int channel = gpu::thread_index();
  reference = 0;
  if (channel < mapping.channels()) {
    const auto* data = static_cast<const typename Mapping::scalar_t*>(x.data);
    reference = gpu::widen(gpu::load<gpu::Reuse::kLikely>(data + mapping.origin(x, channel)));
    shared.coefficients[channel] = reference;
  }
  GatherMoments<Mapping> step(x);
  gather(mapping, part_items(geometry, mapping.part()), step);
  gpu::sync_block();
  return merge_block(mapping, geometry, step.result(mapping, shared.coefficients), shared.scratch);
}

// Thread `channel` gets the sums of the part's elements of that channel. With given statistics dx
// is written on the way.
template <typename Mapping, typename Epilogue, typename acc_t>
FASTBN_DEVICE GradSums<acc_t, 1> block_gradients(const Mapping& mapping, const Geometry& geometry,
                                                 const Backward& op, Shared<acc_t>& shared,
                                                 const Epilogue& epilogue) {
  const int channel = gpu::thread_index();
  if (channel < mapping.channels()) {
    shared.put(geometry, channel, given_gradient<acc_t>(op, mapping.first_channel() + channel));
  }
  gpu::sync_block();
  GatherGradients<Mapping, Epilogue> step(mapping, op, shared.coefficients, geometry.slab_channels,
                                          epilogue);
  gather(mapping, part_items(geometry, mapping.part()), step);
  return merge_block(mapping, geometry, step.result(), shared.scratch);
}

}  // namespace fastbn::cuda
