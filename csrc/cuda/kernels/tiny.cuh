// SPDX-License-Identifier: BSD-3-Clause
//
// Algorithm::kTiny: a block has all elements of its slab, gathers their statistics and applies them
// at once. For tensors whose time is that of a launch.
//
//   mapping    block = slab, one part each; columns.cuh, segments.cuh and strided.cuh.
//   traffic    that of split.cuh, the second reading from the nearest cache; one launch.
//   numerics   and order: those of split.cuh, with nothing to merge between blocks.
#pragma once

#include "block.cuh"

namespace fastbn::cuda {

template <typename Mapping, typename Epilogue>
FASTBN_KERNEL(kMaxThreads, Mapping::kOccupancy.blocks)
tiny_forward(FASTBN_PARAMETER TrainingForward op, FASTBN_PARAMETER Geometry geometry,
             FASTBN_PARAMETER Epilogue epilogue) {
  using acc_t = typename Mapping::acc_t;
  if (gpu::block_index() == 0) count_batch(op);
  const auto mapping = block_mapping<Mapping>(op.problem, geometry, gpu::block_index());
  Shared<acc_t> shared(geometry);
  acc_t reference;
  const Moments<acc_t, 1> moments = block_moments(mapping, geometry, op.x, shared, reference);
  const int thread = gpu::thread_index();
  if (thread < mapping.channels()) {
    const int64_t channel = mapping.first_channel() + thread;
    const Statistics<acc_t> statistics(op, moments, reference);
    shared.put(geometry, thread, statistics.affine(read_parameters(op, channel, reference)));
    statistics.save(op, channel);
  }
  gpu::sync_block();
  apply(mapping, part_items(geometry, mapping.part()),
        Normalise<Mapping, Epilogue>(mapping, op.x, op.y, shared.coefficients,
                                     geometry.slab_channels, epilogue));
}

template <typename Mapping, typename Epilogue>
FASTBN_KERNEL(kMaxThreads, Mapping::kOccupancy.blocks)
tiny_backward(FASTBN_PARAMETER Backward op, FASTBN_PARAMETER Geometry geometry,
              FASTBN_PARAMETER Epilogue epilogue) {
  using acc_t = typename Mapping::acc_t;
  const auto mapping = block_mapping<Mapping>(op.problem, geometry, gpu::block_index());
  Shared<acc_t> shared(geometry);
  const GradSums<acc_t, 1> sums = block_gradients(mapping, geometry, op, shared, epilogue);
  const int channel = gpu::thread_index();
  if (channel < mapping.channels()) {
    const auto given = shared.template get<kCoefficients>(geometry, channel);
    shared.put(geometry, channel, training_gradient(op, given, sums));
    save_gradients(op, mapping.first_channel() + channel, given.values[kInvstd], sums);
  }
  gpu::sync_block();
  apply(mapping, part_items(geometry, mapping.part()),
        Differentiate<Mapping, Epilogue>(mapping, op, shared.coefficients, geometry.slab_channels,
                                         epilogue));
}

}  // namespace fastbn::cuda
