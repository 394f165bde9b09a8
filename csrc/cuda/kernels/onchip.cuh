// SPDX-License-Identifier: BSD-3-Clause
//
// Algorithm::kResident, kCluster and kGrid: tensors stay in shared memory between gathering and
// applying.
//
//   mapping    block = team * parts + part. The blocks of a team have one part each of a slab, and
//              take every teams-th slab; columns.cuh and segments.cuh tell how the threads of a
//              block map to (N, C, S). A team is one block, a thread-block cluster, or blocks of a
//              cooperative grid.
//   traffic    forward reads x and writes y; backward reads dy and x and writes dx. Items of a part
//              that find no room are read twice, from the end: the cache still holds what was read
//              last. Backward has both tensors of an item reside or none: for the traffic that is
//              what having one of them reside for twice as many would be. One launch.
//   overlap    what is applied is replaced at once by what comes next: the memory is busy while
//              blocks wait for each other, as far as shared memory has room for more than a part.
//   numerics   sums shifted by the first value a thread sees, while the rest is still arriving;
//              merged by Chan. values.cuh tells what they lose, which is why there is no second
//              sweep once the mean is known.
//   order      threads take fixed elements; threads, columns and parts merge in a fixed order, by
//              whomever. Nothing depends on the schedule.
#pragma once

#include "block.cuh"
#include "exchange.cuh"
#include "ring.cuh"

namespace fastbn::cuda {

// Calls step(chunk) for all items of a part: those that reside, as they arrive, and the rest.
template <typename Mapping, typename Ring, typename Step>
FASTBN_DEVICE void gather_part(const Mapping& mapping, const Geometry& geometry, const Ring& ring,
                               Step& step) {
#pragma unroll 1
  for (int stage = 0; stage < geometry.residence.stages; ++stage) {
    ring.wait(stage);
    take_held(mapping, ring.stage(stage), ring.held(stage), step);
  }
  gather(mapping, ring.rest(), step);
}

// The same for the second time: the rest first.
template <typename Mapping, typename Ring, typename Step>
FASTBN_DEVICE void apply_part(const Mapping& mapping, const Geometry& geometry, Ring& ring,
                              const Step& step) {
  apply(mapping, ring.rest(), step);
#pragma unroll 1
  for (int stage = 0; stage < geometry.residence.stages; ++stage) {
    take_held(mapping, ring.stage(stage), ring.held(stage), step);
    ring.give_up();
  }
  ring.next_slab();
  gpu::sync_block();  // before anything that this slab used is written again
}

template <typename Mapping, typename Epilogue>
FASTBN_KERNEL(kMaxThreads, kOnChipBlocks)
onchip_forward(FASTBN_PARAMETER TrainingForward op, FASTBN_PARAMETER Geometry geometry,
               FASTBN_PARAMETER Workspace workspace, FASTBN_PARAMETER Epilogue epilogue) {
  using acc_t = typename Mapping::acc_t;
  if (gpu::block_index() == 0) count_batch(op);
  const int team = gpu::block_index() / geometry.parts;
  const int part = gpu::block_index() % geometry.parts;
  const int thread = gpu::thread_index();
  Shared<acc_t> shared(geometry);
  Ring<Mapping, 1> ring(op.problem, geometry, team, part, op.x, op.x);
  int turn = 0;
#pragma unroll 1
  for (int slab = team; slab < geometry.slabs; slab += geometry.residence.teams) {
    const Mapping mapping(op.problem, geometry, slab, part);
    ring.wait(0);
    LocatedMoments<acc_t> part_moments;
    if (thread < mapping.channels()) {
      const auto* first = reinterpret_cast<const typename Mapping::scalar_t*>(ring.held(0));
      part_moments.reference = gpu::widen(first[mapping.first_element(thread)]);
      shared.put(geometry, thread,
                 read_parameters(op, mapping.first_channel() + thread, part_moments.reference));
    }
    GatherMoments<Mapping> gathered(op.x);
    gather_part(mapping, geometry, ring, gathered);
    gpu::sync_block();
    part_moments.moments = merge_block(
        mapping, geometry, gathered.result(mapping, shared.coefficients), shared.scratch);
    const LocatedMoments<acc_t> all =
        exchange<acc_t>(mapping, geometry, workspace, team, turn, part_moments, shared.scratch);
    const Statistics<acc_t> statistics(op, all.moments, all.reference);
    if (thread < mapping.channels()) {
      const auto parameters = shared.template get<3>(geometry, thread);
      shared.put(geometry, thread, statistics.affine(parameters));
    }
    gpu::sync_block();
    // While the others go on.
    if (thread < mapping.channels() && part == 0) {
      statistics.save(op, mapping.first_channel() + thread);
    }
    apply_part(mapping, geometry, ring,
               Normalise<Mapping, Epilogue>(mapping, op.x, op.y, shared.coefficients,
                                            geometry.slab_channels, epilogue));
    turn ^= 1;
  }
  leave(geometry);
}

template <typename Mapping, typename Epilogue>
FASTBN_KERNEL(kMaxThreads, kOnChipBlocks)
onchip_backward(FASTBN_PARAMETER Backward op, FASTBN_PARAMETER Geometry geometry,
                FASTBN_PARAMETER Workspace workspace, FASTBN_PARAMETER Epilogue epilogue) {
  using acc_t = typename Mapping::acc_t;
  const int team = gpu::block_index() / geometry.parts;
  const int part = gpu::block_index() % geometry.parts;
  const int thread = gpu::thread_index();
  Shared<acc_t> shared(geometry);
  Ring<Mapping, 2> ring(op.problem, geometry, team, part, op.dy, op.x);
  int turn = 0;
#pragma unroll 1
  for (int slab = team; slab < geometry.slabs; slab += geometry.residence.teams) {
    const Mapping mapping(op.problem, geometry, slab, part);
    if (thread < mapping.channels()) {
      shared.put(geometry, thread, given_gradient<acc_t>(op, mapping.first_channel() + thread));
    }
    gpu::sync_block();
    GatherGradients<Mapping, Epilogue> gathered(mapping, op, shared.coefficients,
                                                geometry.slab_channels, epilogue);
    gather_part(mapping, geometry, ring, gathered);
    const auto part_sums = merge_block(mapping, geometry, gathered.result(), shared.scratch);
    const auto sums =
        exchange<acc_t>(mapping, geometry, workspace, team, turn, part_sums, shared.scratch);
    acc_t invstd = 0;
    if (thread < mapping.channels()) {
      const auto given = shared.template get<kCoefficients>(geometry, thread);
      invstd = given.values[kInvstd];
      shared.put(geometry, thread, training_gradient(op, given, sums));
    }
    gpu::sync_block();
    // While the others go on.
    if (thread < mapping.channels() && part == 0) {
      save_gradients(op, mapping.first_channel() + thread, invstd, sums);
    }
    apply_part(mapping, geometry, ring,
               Differentiate<Mapping, Epilogue>(mapping, op, shared.coefficients,
                                                geometry.slab_channels, epilogue));
    turn ^= 1;
  }
  leave(geometry);
}

}  // namespace fastbn::cuda
