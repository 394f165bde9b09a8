// SPDX-License-Identifier: BSD-3-Clause
//
// Algorithm::kTwoPass: one kernel reduces, the next applies. For any problem. Each of them is also
// a step of its own, that leaves or combines rows of partial results; and what needs one pass alone
// is here, too.
//
//   mapping    block = split * channel_tiles + channel_tile; layouts/ tells how the threads of a
//              block map to (N, C, S). Both kernels have the same grid, the second from its end and
//              backward, so that it meets what the first left in the cache.
//   traffic    forward reads x twice and writes y; backward reads dy and x twice and writes dx.
//              Evaluation is the second kernel alone; without dx, or with given statistics,
//              backward is the first alone.
//   epilogue   forward's second kernel computes it, and reads the residual. Backward's first one
//              turns dy into the gradient of the pre-activation, by a mask if there is one; the
//              second reads that if it is wanted as the gradient of the residual, or else does so
//              again.
//   numerics   pivoted sums per thread, merged by Chan; see PivotedSums and core/finalize.h.
//   order      threads take fixed elements; threads, columns and splits merge in fixed order, the
//              splits by the block that comes last, whichever it is. Nothing depends on the
//              schedule.
#pragma once

#include "../steps/block.cuh"

namespace fastbn::cuda {

// Leaves the coefficients of a channel for the next kernel.
template <typename acc_t, typename Record>
FASTBN_DEVICE void leave_coefficients(const Workspace& workspace, int64_t channels, int64_t channel,
                                      const Record& record) {
  acc_t* arrays = static_cast<acc_t*>(workspace.coefficients);
#pragma unroll
  for (int i = 0; i < kNumbers<acc_t, Record>; ++i) {
    gpu::store<gpu::CacheHint::kKeep>(arrays + i * channels + channel,
                                      numbers_of<acc_t>(record)[i]);
  }
}

// Loads the coefficients of a channel that the previous kernel left.
template <typename Record, typename acc_t>
FASTBN_DEVICE Record load_coefficients(const Workspace& workspace, int64_t channels,
                                       int64_t channel) {
  const acc_t* arrays = static_cast<const acc_t*>(workspace.coefficients);
  Record record;
#pragma unroll
  for (int i = 0; i < kNumbers<acc_t, Record>; ++i) {
    numbers_of<acc_t>(record)[i] = gpu::load_coherent(arrays + i * channels + channel);
  }
  return record;
}

// Blocks that share an SM's registers. Functions of float64 take more of them than two blocks have,
// and so does whoever sums up what a function returns.
template <typename Mapping, EpilogueKind kKind, bool kReduces = false>
constexpr int kBlocks =
    kKind != EpilogueKind::kNone && (kReduces || sizeof(typename Mapping::acc_t) == 8)
        ? 1
        : Mapping::kOccupancy.blocks;

template <typename Mapping>
FASTBN_KERNEL(kMaxThreads, Mapping::kOccupancy.blocks)
two_pass_forward_reduce(FASTBN_PARAMETER TrainingForward op, FASTBN_PARAMETER Geometry geometry,
                        FASTBN_PARAMETER Workspace workspace) {
  using acc_t = typename Mapping::acc_t;
  gpu::allow_next_kernel();
  const auto mapping = block_mapping<Mapping>(op.problem, geometry, gpu::block_index());
  const Shared<acc_t> shared(geometry);
  PivotedMoments<acc_t> all = reduce_stats(mapping, geometry, op.x, shared);
  const int64_t channels = op.problem.channels;
  if (!reduce_splits<acc_t>(mapping, geometry, workspace, channels, all.moments, shared.scratch)) {
    return;
  }
  const int thread = gpu::thread_index();
  if (thread >= mapping.channels()) return;
  const int64_t channel = mapping.first_channel() + thread;
  if (op.steps == Steps::kReduce) {
    leave_moments(op, channel, all);
    return;
  }
  const FinalStatistics<acc_t> statistics(op, all);
  leave_coefficients<acc_t>(workspace, channels, channel,
                            statistics.affine(forward_inputs(op, channel, all.pivot)));
  statistics.save(channel);
  statistics.update_running(channel);
}

template <typename Mapping, EpilogueKind kKind>
FASTBN_KERNEL(kMaxThreads, (kBlocks<Mapping, kKind>))
two_pass_forward_apply(FASTBN_PARAMETER TrainingForward op, FASTBN_PARAMETER Geometry geometry,
                       FASTBN_PARAMETER Workspace workspace) {
  using acc_t = typename Mapping::acc_t;
  gpu::wait_for_previous_kernel();
  const int block = gpu::grid_blocks() - 1 - gpu::block_index();
  if (block == 0) count_batch(op.running);
  const auto mapping = block_mapping<Mapping>(op.problem, geometry, block);
  apply_forward<kKind>(mapping, geometry, op, [&](int64_t channel) {
    return load_coefficients<Affine<acc_t>, acc_t>(workspace, op.problem.channels, channel);
  });
}

// Applies by rows of partial results, which every block combines for its channels.
template <typename Mapping>
FASTBN_KERNEL(kMaxThreads, Mapping::kOccupancy.blocks)
combine_forward_apply(FASTBN_PARAMETER TrainingForward op, FASTBN_PARAMETER Geometry geometry) {
  using acc_t = typename Mapping::acc_t;
  if (gpu::block_index() == 0) count_batch(op.running);
  const auto mapping = block_mapping<Mapping>(op.problem, geometry, gpu::block_index());
  apply_forward<EpilogueKind::kNone>(mapping, geometry, op, [&](int64_t channel) {
    return combine_forward<acc_t>(op, channel, mapping.split() == 0);
  });
}

template <typename Mapping, EpilogueKind kKind>
FASTBN_KERNEL(kMaxThreads, (kBlocks<Mapping, kKind>))
eval_forward(FASTBN_PARAMETER EvalForward op, FASTBN_PARAMETER Geometry geometry) {
  using acc_t = typename Mapping::acc_t;
  const auto mapping = block_mapping<Mapping>(op.problem, geometry, gpu::block_index());
  apply_forward<kKind>(mapping, geometry, op, [&](int64_t channel) {
    return eval_affine<acc_t>(op, channel, mapping.split() == 0);
  });
}

template <typename Mapping, EpilogueKind kKind>
FASTBN_KERNEL(kMaxThreads, (kBlocks<Mapping, kKind, true>))
two_pass_backward_reduce(FASTBN_PARAMETER Backward op, FASTBN_PARAMETER Geometry geometry,
                         FASTBN_PARAMETER Workspace workspace) {
  using acc_t = typename Mapping::acc_t;
  gpu::allow_next_kernel();
  const auto mapping = block_mapping<Mapping>(op.problem, geometry, gpu::block_index());
  const auto shared = grad_shared<acc_t, kKind>(geometry);
  GradSums<acc_t> sums = reduce_grad<kKind>(mapping, geometry, op, shared);
  const int64_t channels = op.problem.channels;
  if (!reduce_splits<acc_t>(mapping, geometry, workspace, channels, sums, shared.scratch)) return;
  const int thread = gpu::thread_index();
  if (thread >= mapping.channels()) return;
  const int64_t channel = mapping.first_channel() + thread;
  const auto inputs = shared.records.template get<GradInputs<acc_t>>(thread);
  save_parameter_gradients(op, channel, inputs.invstd, sums);
  if (op.steps == Steps::kReduce) {
    leave_grad_sums(op, channel, sums);
  } else {
    leave_coefficients<acc_t>(workspace, channels, channel,
                              finalize_gradient(inputs, sums, op.count));
  }
}

template <typename Mapping, EpilogueKind kKind>
FASTBN_KERNEL(kMaxThreads, (kBlocks<Mapping, kKind>))
two_pass_backward_apply(FASTBN_PARAMETER Backward op, FASTBN_PARAMETER Geometry geometry,
                        FASTBN_PARAMETER Workspace workspace) {
  using acc_t = typename Mapping::acc_t;
  gpu::wait_for_previous_kernel();
  const int block = gpu::grid_blocks() - 1 - gpu::block_index();
  const auto mapping = block_mapping<Mapping>(op.problem, geometry, block);
  apply_backward<kKind>(mapping, geometry, op, [&](int64_t channel) {
    return load_coefficients<GradAffine<acc_t>, acc_t>(workspace, op.problem.channels, channel);
  });
}

// Applies gradients by rows of partial results.
template <typename Mapping>
FASTBN_KERNEL(kMaxThreads, Mapping::kOccupancy.blocks)
combine_backward_apply(FASTBN_PARAMETER Backward op, FASTBN_PARAMETER Geometry geometry) {
  using acc_t = typename Mapping::acc_t;
  const auto mapping = block_mapping<Mapping>(op.problem, geometry, gpu::block_index());
  apply_backward<EpilogueKind::kNone>(
      mapping, geometry, op, [&](int64_t channel) { return combine_backward<acc_t>(op, channel); });
}

// dx with given statistics, and nothing else.
template <typename Mapping>
FASTBN_KERNEL(kMaxThreads, Mapping::kOccupancy.blocks)
eval_backward(FASTBN_PARAMETER Backward op, FASTBN_PARAMETER Geometry geometry) {
  using acc_t = typename Mapping::acc_t;
  const auto mapping = block_mapping<Mapping>(op.problem, geometry, gpu::block_index());
  const Shared<acc_t> shared(geometry);
  put_records(mapping, shared, [&](int64_t channel) { return grad_inputs<acc_t>(op, channel); });
  apply<Mapping::kOccupancy.loads>(mapping, split_range(geometry, mapping.split()),
                                   ApplyBackwardEval<Mapping>(mapping, op, shared.records));
}

}  // namespace fastbn::cuda
