// SPDX-License-Identifier: BSD-3-Clause
//
// Algorithm::kOneBlock: a block has all elements of its channel tile, reduces them and applies the
// result at once. For tensors whose time is that of a launch.
//
//   mapping    block = channel tile, one split each; see layouts/.
//   traffic    that of two_pass.cuh, the second reading from the nearest cache; one launch.
//   numerics   and order: those of two_pass.cuh, with nothing to merge between blocks.
#pragma once

#include "../steps/block.cuh"

namespace fastbn::cuda {

template <typename Mapping>
FASTBN_KERNEL(kMaxThreads, Mapping::kOccupancy.blocks)
one_block_forward(FASTBN_PARAMETER TrainingForward op, FASTBN_PARAMETER Geometry geometry) {
  using acc_t = typename Mapping::acc_t;
  if (gpu::block_index() == 0) count_batch(op.running);
  const auto mapping = block_mapping<Mapping>(op.problem, geometry, gpu::block_index());
  const Shared<acc_t> shared(geometry);
  const PivotedMoments<acc_t> all = reduce_stats(mapping, geometry, op.x, shared);
  const int thread = gpu::thread_index();
  if (thread < mapping.channels()) {
    const int64_t channel = mapping.first_channel() + thread;
    const FinalStatistics<acc_t> statistics(op, all);
    shared.records.put(thread, statistics.affine(forward_inputs(op, channel, all.pivot)));
    statistics.save(channel);
    statistics.update_running(channel);
  }
  gpu::sync_block();
  apply<Mapping::kOccupancy.loads>(
      mapping, split_range(geometry, mapping.split()),
      ApplyForward<Mapping, EpilogueKind::kNone, TrainingForward>(mapping, op, shared.records));
}

template <typename Mapping>
FASTBN_KERNEL(kMaxThreads, Mapping::kOccupancy.blocks)
one_block_backward(FASTBN_PARAMETER Backward op, FASTBN_PARAMETER Geometry geometry) {
  using acc_t = typename Mapping::acc_t;
  const auto mapping = block_mapping<Mapping>(op.problem, geometry, gpu::block_index());
  const Shared<acc_t> shared(geometry);
  const GradSums<acc_t> sums = reduce_grad<EpilogueKind::kNone>(mapping, geometry, op, shared);
  const int thread = gpu::thread_index();
  if (thread < mapping.channels()) {
    const auto inputs = shared.records.template get<GradInputs<acc_t>>(thread);
    shared.records.put(thread, finalize_gradient(inputs, sums, op.count));
    save_parameter_gradients(op, mapping.first_channel() + thread, inputs.invstd, sums);
  }
  gpu::sync_block();
  apply<Mapping::kOccupancy.loads>(
      mapping, split_range(geometry, mapping.split()),
      ApplyBackward<Mapping, EpilogueKind::kNone>(mapping, op, op.dy, shared.records));
}

}  // namespace fastbn::cuda
