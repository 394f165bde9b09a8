// SPDX-License-Identifier: BSD-3-Clause
//
// What a block does with its split of a channel tile, in all algorithms.
#pragma once

#include "../primitives/block_reduce.cuh"
#include "elementwise.cuh"

namespace fastbn::cuda {

// The block's shared memory: a record of each channel, then scratch to merge.
template <typename acc_t>
struct Shared {
  ChannelRecords<acc_t> records;
  void* scratch;

  FASTBN_DEVICE explicit Shared(const Geometry& geometry, bool has_shift = false)
      : records(gpu::shared_memory(), geometry),
        scratch(static_cast<acc_t*>(gpu::shared_memory()) +
                record_numbers(has_shift) * geometry.tile_channels) {}
};

// The mapping of a block without persistence.
template <typename Mapping>
FASTBN_DEVICE Mapping block_mapping(const Problem& problem, const Geometry& geometry, int block) {
  return Mapping(problem, geometry, block % geometry.channel_tiles, block / geometry.channel_tiles);
}

// Puts record_of(channel) of each channel of the channel tile, and makes it visible to the block.
template <typename Mapping, typename acc_t, typename RecordOf>
FASTBN_DEVICE void put_records(const Mapping& mapping, const Shared<acc_t>& shared,
                               const RecordOf& record_of) {
  const int thread = gpu::thread_index();
  if (thread < mapping.channels()) {
    shared.records.put(thread, record_of(mapping.first_channel() + thread));
  }
  gpu::sync_block();
}

// Reduces a split: thread `channel` gets the moments of its elements of that channel, counted from
// the channel's first element.
template <typename Mapping, typename acc_t>
FASTBN_DEVICE PivotedMoments<acc_t> reduce_stats(const Mapping& mapping, const Geometry& geometry,
                                                 const InputActivation& x,
                                                 const Shared<acc_t>& shared) {
  const int channel = gpu::thread_index();
  PivotedMoments<acc_t> result;
  if (channel < mapping.channels()) {
    const auto* data = static_cast<const typename Mapping::scalar_t*>(x.data);
    result.pivot =
        gpu::widen(gpu::load<gpu::CacheHint::kKeep>(data + mapping.first_offset(x, channel)));
    shared.records.put(channel, ForwardInputs<acc_t>{result.pivot, 1, 0});
  }
  ReduceStats<Mapping> step(x);
  reduce<Mapping::kOccupancy.loads>(mapping, split_range(geometry, mapping.split()), step);
  gpu::sync_block();
  const acc_t* pivots = shared.records.array(&ForwardInputs<acc_t>::pivot);
  result.moments = reduce_block(mapping, geometry, step.result(mapping, pivots), shared.scratch);
  return result;
}

// That of backward, with forward's shift where the pre-activation is computed.
template <typename acc_t, EpilogueKind kKind>
FASTBN_DEVICE Shared<acc_t> grad_shared(const Geometry& geometry) {
  return Shared<acc_t>(geometry, computes_z(kKind));
}

// Puts the shift of each channel, if it is needed; to be followed by put_records().
template <EpilogueKind kKind, typename Mapping, typename acc_t>
FASTBN_DEVICE void put_shifts(const Mapping& mapping, const Backward& op,
                              const Shared<acc_t>& shared) {
  if constexpr (computes_z(kKind)) {
    const int thread = gpu::thread_index();
    if (thread < mapping.channels()) {
      const acc_t shift = shift_of<acc_t>(op, mapping.first_channel() + thread);
      shared.records.put(kShiftPlace, thread, shift);
    }
  }
}

// Reduces a split: thread `channel` gets the sums of its elements of that channel, and leaves
// GradInputs of it in shared memory. With given statistics dx is written on the way.
template <EpilogueKind kKind, typename Mapping, typename acc_t>
FASTBN_DEVICE GradSums<acc_t> reduce_grad(const Mapping& mapping, const Geometry& geometry,
                                          const Backward& op, const Shared<acc_t>& shared) {
  put_shifts<kKind>(mapping, op, shared);
  put_records(mapping, shared, [&](int64_t channel) { return grad_inputs<acc_t>(op, channel); });
  const Range range = split_range(geometry, mapping.split());
  const auto reduce_by = [&](auto step) {
    reduce<Mapping::kOccupancy.loads>(mapping, range, step);
    return step.result();
  };
  const auto sums =
      !op.training && op.dx.data != nullptr
          ? reduce_by(ReduceGrad<Mapping, kKind, OnTheWay::kDx>(mapping, op, shared.records))
          : reduce_by(ReduceGrad<Mapping, kKind, OnTheWay::kNothing>(mapping, op, shared.records));
  return reduce_block(mapping, geometry, sums, shared.scratch);
}

// Applies record_of(channel), an Affine, to a split: y.
template <EpilogueKind kKind, typename Mapping, typename Forward, typename RecordOf>
FASTBN_DEVICE void apply_forward(const Mapping& mapping, const Geometry& geometry,
                                 const Forward& op, const RecordOf& record_of) {
  const Shared<typename Mapping::acc_t> shared(geometry);
  put_records(mapping, shared, record_of);
  apply<Mapping::kOccupancy.loads>(
      mapping, split_range(geometry, mapping.split()),
      ApplyForward<Mapping, kKind, Forward>(mapping, op, shared.records));
}

// Applies record_of(channel), a GradAffine, to a split: dx.
template <EpilogueKind kKind, typename Mapping, typename RecordOf>
FASTBN_DEVICE void apply_backward(const Mapping& mapping, const Geometry& geometry,
                                  const Backward& op, const RecordOf& record_of) {
  const auto shared = grad_shared<typename Mapping::acc_t, kKind>(geometry);
  put_shifts<kKind>(mapping, op, shared);
  put_records(mapping, shared, record_of);
  apply<Mapping::kOccupancy.loads>(
      mapping, split_range(geometry, mapping.split()),
      ApplyBackward<Mapping, kKind>(mapping, op, op.dy, shared.records));
}

}  // namespace fastbn::cuda
