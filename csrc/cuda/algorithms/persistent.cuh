// SPDX-License-Identifier: BSD-3-Clause
//
// Algorithm::kPersistentBlock, kPersistentCluster and kPersistentGrid: tensors stay in shared
// memory between reducing and applying.
//
//   mapping    block = cta_group * splits + split. The blocks of a CTA group have one split each of
//              a channel tile; channel tiles go round the groups. See layouts/ for how the threads
//              of a block map to (N, C, S). A CTA group is one block, a thread-block cluster, or
//              blocks of a cooperative grid.
//   traffic    forward reads x and writes y; backward reads dy and x and writes dx. Rows of a split
//              that find no room in shared memory are read twice, from the end: the cache still
//              holds what was read last. In backward both tensors of a row find room or none: for
//              the traffic that is what room for one of them, of twice as many rows, would be. One
//              launch.
//   epilogue   a residual is one more tensor that is read, and once: forward reads it only to
//   apply.
//              Backward turns dy into the gradient of the pre-activation while it reduces, and
//              leaves that in the place of dy or, of rows that find no room, of dx, unless it is
//              wanted as the gradient of the residual: to apply is the same then as without. A mask
//              does not pass through shared memory: forward writes it while it applies, and
//              backward reads it while it reduces.
//   overlap    a tile that was applied makes way at once for the next: the memory is busy while
//              blocks wait for each other, as far as there are stages for more than a split. Where
//              the copy engine moves tiles, a producer warp lets it store results and fill stages,
//              and consumers wait for each other only when a channel tile is reduced and when it
//              is done.
//   numerics   pivoted sums per thread, taken while the rest is still arriving; merged by Chan.
//              PivotedSums tells what they lose, which is why there is no second sweep once the
//              mean is known.
//   order      threads take fixed elements; threads, columns and splits merge in a fixed order, by
//              whomever. Nothing depends on the schedule.
#pragma once

#include "../primitives/group_reduce.cuh"
#include "../primitives/pipeline.cuh"
#include "../steps/block.cuh"

namespace fastbn::cuda {

// Vectors in flight where tensors are read from memory. What else a kernel with an epilogue holds
// leaves registers for half as many.
template <typename Mapping, EpilogueKind kKind>
constexpr int kRestLoads = Mapping::kOccupancy.loads / (kKind == EpilogueKind::kNone ? 1 : 2);

// Takes a tile from shared memory; kInPlace leaves the results there.
template <bool kInPlace, typename Mapping, typename Pipeline, typename Step>
FASTBN_DEVICE void step_in_smem(const Mapping& mapping, const Pipeline& pipeline, int tile,
                                Step& step) {
  constexpr int kVectors = vectors_of_each(kSmemVectors, Step::kShares);
  mapping.template for_each_in_smem<kVectors, kInPlace>(pipeline.tile(tile), pipeline.smem(tile),
                                                        step);
}

// Reduces a split: its tiles as they arrive, then the rest, with kLoads vectors in flight.
template <int kLoads, typename Mapping, typename Pipeline, typename Step>
FASTBN_DEVICE void reduce_split(const Mapping& mapping, const Geometry& geometry,
                                const Pipeline& pipeline, Step& step) {
  if (pipeline.is_producer()) return;
#pragma unroll 1
  for (int tile = 0; tile < geometry.persistence.tiles; ++tile) {
    pipeline.consumer_wait(tile);
    step_in_smem<false>(mapping, pipeline, tile, step);
  }
  reduce<kLoads>(mapping, pipeline.rest(), step);
}

// Applies to a split: the rest first, then its tiles, whose stages are released. Results go to
// `to`.
template <int kLoads, typename Mapping, typename Pipeline, typename Step>
FASTBN_DEVICE void apply_split(const Mapping& mapping, const Geometry& geometry, Pipeline& pipeline,
                               const Step& step, const OutputActivation& to) {
  if (pipeline.is_producer()) {
    pipeline.producer_store(mapping, to);
  } else {
    apply<kLoads>(mapping, pipeline.rest(), step);
#pragma unroll 1
    for (int tile = 0; tile < geometry.persistence.tiles; ++tile) {
      if (pipeline.is_in_bulk()) {
        step_in_smem<true>(mapping, pipeline, tile, step);
        pipeline.consumer_release(tile);
      } else {
        step_in_smem<false>(mapping, pipeline, tile, step);
        pipeline.fill();
      }
    }
  }
  pipeline.advance();
  gpu::sync_block();  // before anything that this channel tile used is written again
}

// Has the values per channel at hand that the group's next channel tile begins with.
template <typename Mapping, typename... Vectors>
FASTBN_DEVICE void prefetch_next(const Mapping& mapping, const Problem& problem,
                                 const Geometry& geometry, const Vectors&... vectors) {
  const int thread = gpu::thread_index();
  const int64_t channel = mapping.first_channel() + thread +
                          int64_t{geometry.persistence.cta_groups} * geometry.tile_channels;
  if (thread < geometry.tile_channels && channel < problem.channels) {
    (prefetch(vectors, channel), ...);
  }
}

// Has a mask at hand for a split of a channel tile, if there is such a tile. Threads load its bytes
// when the activations have arrived, and would wait for memory once more.
template <typename Mapping>
FASTBN_DEVICE void prefetch_mask(const Problem& problem, const Geometry& geometry,
                                 const uint8_t* mask, int channel_tile, int split) {
  constexpr int kCacheLine = 128;
  if (channel_tile >= geometry.channel_tiles) return;
  const Mapping mapping(problem, geometry, channel_tile, split);
  const Range range = split_range(geometry, split);
  const int spans = mapping.bulk_spans(range);
#pragma unroll 1
  for (int i = gpu::thread_index(); i < spans; i += gpu::block_threads()) {
    const BulkSpan span = mapping.bulk_span(range, i);
    const int64_t first =
        span.offset * static_cast<int>(sizeof(typename Mapping::scalar_t)) / kVectorBytes;
    const int bytes = span.bytes / kVectorBytes;
#pragma unroll 1
    for (int byte = 0; byte < bytes; byte += kCacheLine) gpu::prefetch(mask + first + byte);
  }
}

template <typename Mapping, EpilogueKind kKind>
FASTBN_KERNEL(kMaxThreads, kPersistentBlocks)
persistent_forward(FASTBN_PARAMETER TrainingForward op, FASTBN_PARAMETER Geometry geometry,
                   FASTBN_PARAMETER Workspace workspace,
                   FASTBN_PARAMETER TileMaps<kForwardInputs<kKind>> maps) {
  using acc_t = typename Mapping::acc_t;
  if (gpu::block_index() == 0) count_batch(op.running);
  const int cta_group = gpu::block_index() / geometry.splits;
  const int split = gpu::block_index() % geometry.splits;
  const int thread = gpu::thread_index();
  const Shared<acc_t> shared(geometry);
  Pipeline<Mapping, kForwardInputs<kKind>> pipeline(op.problem, geometry, cta_group, split,
                                                    inputs<kKind>(op), maps);
  begin_group_reduce(geometry);
  int round = 0;
#pragma unroll 1
  for (int channel_tile = cta_group; channel_tile < geometry.channel_tiles;
       channel_tile += geometry.persistence.cta_groups) {
    const Mapping mapping(op.problem, geometry, channel_tile, split);
    prefetch_next(mapping, op.problem, geometry, op.weight, op.bias, op.running.mean,
                  op.running.var);
    pipeline.consumer_wait(0);
    PivotedMoments<acc_t> of_split;
    if (thread < mapping.channels()) {
      const auto* row = reinterpret_cast<const typename Mapping::scalar_t*>(pipeline.smem(0));
      of_split.pivot = gpu::widen(gpu::load_shared(row + mapping.first_in_row(thread)));
      shared.records.put(thread,
                         forward_inputs(op, mapping.first_channel() + thread, of_split.pivot));
    }
    ReduceStats<Mapping> stats(op.x);
    reduce_split<Mapping::kOccupancy.loads>(mapping, geometry, pipeline, stats);
    gpu::sync_block();
    const acc_t* pivots = shared.records.array(&ForwardInputs<acc_t>::pivot);
    of_split.moments =
        reduce_block(mapping, geometry, stats.result(mapping, pivots), shared.scratch);
    const PivotedMoments<acc_t> all = group_reduce<acc_t>(mapping, geometry, workspace, cta_group,
                                                          round, of_split, shared.scratch);
    // In float64, which many GPUs are slow at: for no more threads than there are channels.
    if (thread < mapping.channels()) {
      const auto inputs = shared.records.template get<ForwardInputs<acc_t>>(thread);
      shared.records.put(thread, FinalStatistics<acc_t>(op, all).affine(inputs));
    }
    gpu::sync_block();
    // One block saves while the others go on.
    if (thread < mapping.channels() && split == 0) {
      const FinalStatistics<acc_t> statistics(op, all);
      statistics.save(mapping.first_channel() + thread);
      statistics.update_running(mapping.first_channel() + thread);
    }
    apply_split<kRestLoads<Mapping, kKind>>(
        mapping, geometry, pipeline,
        ApplyForward<Mapping, kKind, TrainingForward>(mapping, op, shared.records), op.y);
    ++round;
  }
}

// What backward applies, of rows that found no room: dy or, with an epilogue, the gradient of the
// pre-activation, where ReduceGrad has left it. Vectors by numbers need no strides.
template <EpilogueKind kKind>
FASTBN_DEVICE InputActivation gradient_to_apply(const Backward& op) {
  InputActivation gradient;
  gradient.data = kKind == EpilogueKind::kNone   ? op.dy.data
                  : op.dresidual.data == nullptr ? op.dx.data
                                                 : op.dresidual.data;
  return gradient;
}

template <typename Mapping, EpilogueKind kKind>
FASTBN_KERNEL(kMaxThreads, kPersistentBlocks)
persistent_backward(FASTBN_PARAMETER Backward op, FASTBN_PARAMETER Geometry geometry,
                    FASTBN_PARAMETER Workspace workspace,
                    FASTBN_PARAMETER TileMaps<kBackwardInputs<kKind>> maps) {
  using acc_t = typename Mapping::acc_t;
  const int cta_group = gpu::block_index() / geometry.splits;
  const int split = gpu::block_index() % geometry.splits;
  const int thread = gpu::thread_index();
  const auto shared = grad_shared<acc_t, kKind>(geometry);
  Pipeline<Mapping, kBackwardInputs<kKind>> pipeline(op.problem, geometry, cta_group, split,
                                                     inputs<kKind>(op), maps);
  begin_group_reduce(geometry);
  if constexpr (kKind == EpilogueKind::kMask) {
    prefetch_mask<Mapping>(op.problem, geometry, op.epilogue.mask, cta_group, split);
  }
  // With an epilogue the steps that apply have no more to do than without: the gradient of the
  // pre-activation waits for them where tiles and rows beyond them have dy and dx.
  constexpr bool kHasEpilogue = kKind != EpilogueKind::kNone;
  constexpr auto kDyHint = kHasEpilogue ? gpu::CacheHint::kOwn : gpu::CacheHint::kStream;
  const InputActivation dy = gradient_to_apply<kKind>(op);
  int round = 0;
#pragma unroll 1
  for (int channel_tile = cta_group; channel_tile < geometry.channel_tiles;
       channel_tile += geometry.persistence.cta_groups) {
    const Mapping mapping(op.problem, geometry, channel_tile, split);
    prefetch_next(mapping, op.problem, geometry, op.weight, op.mean, op.invstd);
    if constexpr (computes_z(kKind)) prefetch_next(mapping, op.problem, geometry, op.bias);
    if constexpr (kKind == EpilogueKind::kMask) {
      prefetch_mask<Mapping>(op.problem, geometry, op.epilogue.mask,
                             channel_tile + geometry.persistence.cta_groups, split);
    }
    put_shifts<kKind>(mapping, op, shared);
    put_records(mapping, shared, [&](int64_t channel) { return grad_inputs<acc_t>(op, channel); });
    ReduceGrad<Mapping, kKind, OnTheWay::kGradient> grad(mapping, op, shared.records);
    reduce_split<kRestLoads<Mapping, kKind>>(mapping, geometry, pipeline, grad);
    const auto of_split = reduce_block(mapping, geometry, grad.result(), shared.scratch);
    const auto sums = group_reduce<acc_t>(mapping, geometry, workspace, cta_group, round, of_split,
                                          shared.scratch);
    acc_t invstd = 0;
    if (thread < mapping.channels()) {
      const auto inputs = shared.records.template get<GradInputs<acc_t>>(thread);
      invstd = inputs.invstd;
      shared.records.put(thread, finalize_gradient(inputs, sums, op.count));
    }
    gpu::sync_block();
    // One block saves while the others go on.
    if (thread < mapping.channels() && split == 0) {
      save_parameter_gradients(op, mapping.first_channel() + thread, invstd, sums);
    }
    apply_split<Mapping::kOccupancy.loads>(
        mapping, geometry, pipeline,
        ApplyBackward<Mapping, EpilogueKind::kNone, kDyHint>(mapping, op, dy, shared.records),
        op.dx);
    ++round;
  }
}

}  // namespace fastbn::cuda
