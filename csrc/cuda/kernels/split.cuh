// SPDX-License-Identifier: BSD-3-Clause
//
// Algorithm::kSplit: one kernel gathers statistics, the next applies them. For any problem.
//
//   mapping    block = part * slabs + slab; columns.cuh, segments.cuh and strided.cuh tell how the
//              threads of a block map to (N, C, S). Both kernels have the same grid, the second
//              from its end and backward, so that it meets what the first left in the cache.
//   traffic    forward reads x twice and writes y; backward reads dy and x twice and writes dx.
//              Evaluation is the second kernel alone; without dx, or with given statistics,
//              backward is the first alone.
//   numerics   shifted sums per thread, merged by Chan; see values.cuh and finish.cuh.
//   order      threads take fixed elements; threads, columns and parts merge in fixed order, the
//              parts by the block that comes last, whichever it is. Nothing depends on the
//              schedule.
#pragma once

#include "block.cuh"

namespace fastbn::cuda {

// Leaves the coefficients of a channel for the next kernel.
template <typename acc_t, int kCount>
FASTBN_DEVICE void save(const Workspace& workspace, int64_t channels, int64_t channel,
                        const Coefficients<acc_t, kCount>& coefficients) {
  acc_t* arrays = static_cast<acc_t*>(workspace.coefficients);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    gpu::store<gpu::Reuse::kLikely>(arrays + i * channels + channel, coefficients.values[i]);
  }
}

// Fetches those of the slab's channels to shared memory.
template <int kCount, typename Mapping, typename acc_t>
FASTBN_DEVICE void fetch(const Workspace& workspace, int64_t channels, const Mapping& mapping,
                         const Geometry& geometry, Shared<acc_t>& shared) {
  const acc_t* arrays = static_cast<const acc_t*>(workspace.coefficients);
  const int thread = gpu::thread_index();
  if (thread < mapping.channels()) {
    Coefficients<acc_t, kCount> coefficients;
    const int64_t channel = mapping.first_channel() + thread;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      coefficients.values[i] = gpu::load_written(arrays + i * channels + channel);
    }
    shared.put(geometry, thread, coefficients);
  }
  gpu::sync_block();
}

template <typename Mapping>
FASTBN_KERNEL(kMaxThreads, Mapping::kOccupancy.blocks)
split_statistics(FASTBN_PARAMETER TrainingForward op, FASTBN_PARAMETER Geometry geometry,
                 FASTBN_PARAMETER Workspace workspace) {
  using acc_t = typename Mapping::acc_t;
  gpu::allow_next_kernel();
  const auto mapping = block_mapping<Mapping>(op.problem, geometry, gpu::block_index());
  const Shared<acc_t> shared(geometry);
  acc_t reference;
  Moments<acc_t, 1> moments = block_moments(mapping, geometry, op.x, shared, reference);
  const int64_t channels = op.problem.channels;
  if (!merge_parts<acc_t>(mapping, geometry, workspace, channels, moments, shared.scratch)) return;
  const int thread = gpu::thread_index();
  if (thread >= mapping.channels()) return;
  const int64_t channel = mapping.first_channel() + thread;
  const Statistics<acc_t> statistics(op, moments, reference);
  save(workspace, channels, channel, statistics.affine(read_parameters(op, channel, reference)));
  statistics.save(op, channel);
}

template <typename Mapping, typename Epilogue>
FASTBN_KERNEL(kMaxThreads, Mapping::kOccupancy.blocks)
split_normalise(FASTBN_PARAMETER TrainingForward op, FASTBN_PARAMETER Geometry geometry,
                FASTBN_PARAMETER Workspace workspace, FASTBN_PARAMETER Epilogue epilogue) {
  gpu::wait_for_previous_kernel();
  const int block = gpu::grid_blocks() - 1 - gpu::block_index();
  if (block == 0) count_batch(op);
  const auto mapping = block_mapping<Mapping>(op.problem, geometry, block);
  Shared<typename Mapping::acc_t> shared(geometry);
  fetch<3>(workspace, op.problem.channels, mapping, geometry, shared);
  apply(mapping, part_items(geometry, mapping.part()),
        Normalise<Mapping, Epilogue>(mapping, op.x, op.y, shared.coefficients,
                                     geometry.slab_channels, epilogue));
}

template <typename Mapping, typename Epilogue>
FASTBN_KERNEL(kMaxThreads, Mapping::kOccupancy.blocks)
inference(FASTBN_PARAMETER InferenceForward op, FASTBN_PARAMETER Geometry geometry,
          FASTBN_PARAMETER Epilogue epilogue) {
  using acc_t = typename Mapping::acc_t;
  const auto mapping = block_mapping<Mapping>(op.problem, geometry, gpu::block_index());
  Shared<acc_t> shared(geometry);
  const int channel = gpu::thread_index();
  if (channel < mapping.channels()) {
    shared.put(geometry, channel,
               given_statistics<acc_t>(op, mapping.first_channel() + channel, mapping.part() == 0));
  }
  gpu::sync_block();
  apply(mapping, part_items(geometry, mapping.part()),
        Normalise<Mapping, Epilogue>(mapping, op.x, op.y, shared.coefficients,
                                     geometry.slab_channels, epilogue));
}

template <typename Mapping, typename Epilogue>
FASTBN_KERNEL(kMaxThreads, Mapping::kOccupancy.blocks)
split_gradients(FASTBN_PARAMETER Backward op, FASTBN_PARAMETER Geometry geometry,
                FASTBN_PARAMETER Workspace workspace, FASTBN_PARAMETER Epilogue epilogue) {
  using acc_t = typename Mapping::acc_t;
  gpu::allow_next_kernel();
  const auto mapping = block_mapping<Mapping>(op.problem, geometry, gpu::block_index());
  Shared<acc_t> shared(geometry);
  GradSums<acc_t, 1> sums = block_gradients(mapping, geometry, op, shared, epilogue);
  const int64_t channels = op.problem.channels;
  if (!merge_parts<acc_t>(mapping, geometry, workspace, channels, sums, shared.scratch)) return;
  const int thread = gpu::thread_index();
  if (thread >= mapping.channels()) return;
  const int64_t channel = mapping.first_channel() + thread;
  const auto given = shared.template get<kCoefficients>(geometry, thread);
  save(workspace, channels, channel, training_gradient(op, given, sums));
  save_gradients(op, channel, given.values[kInvstd], sums);
}

template <typename Mapping, typename Epilogue>
FASTBN_KERNEL(kMaxThreads, Mapping::kOccupancy.blocks)
split_differentiate(FASTBN_PARAMETER Backward op, FASTBN_PARAMETER Geometry geometry,
                    FASTBN_PARAMETER Workspace workspace, FASTBN_PARAMETER Epilogue epilogue) {
  gpu::wait_for_previous_kernel();
  const auto mapping =
      block_mapping<Mapping>(op.problem, geometry, gpu::grid_blocks() - 1 - gpu::block_index());
  Shared<typename Mapping::acc_t> shared(geometry);
  fetch<kCoefficients>(workspace, op.problem.channels, mapping, geometry, shared);
  apply(mapping, part_items(geometry, mapping.part()),
        Differentiate<Mapping, Epilogue>(mapping, op, shared.coefficients, geometry.slab_channels,
                                         epilogue));
}

// dx with given statistics, and nothing else.
template <typename Mapping>
FASTBN_KERNEL(kMaxThreads, Mapping::kOccupancy.blocks)
inference_gradient(FASTBN_PARAMETER Backward op, FASTBN_PARAMETER Geometry geometry) {
  using acc_t = typename Mapping::acc_t;
  const auto mapping = block_mapping<Mapping>(op.problem, geometry, gpu::block_index());
  Shared<acc_t> shared(geometry);
  const int channel = gpu::thread_index();
  if (channel < mapping.channels()) {
    shared.put(geometry, channel, given_gradient<acc_t>(op, mapping.first_channel() + channel));
  }
  gpu::sync_block();
  apply(mapping, part_items(geometry, mapping.part()),
        ScaleGradient<Mapping>(mapping, op, shared.coefficients, geometry.slab_channels));
}

}  // namespace fastbn::cuda
