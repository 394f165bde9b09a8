// SPDX-License-Identifier: BSD-3-Clause
//
// Merging what threads and splits have reduced, always in the same order: results are bitwise the
// same every time. A Value has merge(other), and its default neither adds nor takes anything.
#pragma once

#include "channel_values.cuh"

namespace fastbn::cuda {

// Merges the values of all rows of threads, column by column, as a tree. Row 0 returns the result.
// All threads of the block call this; those with row >= rows have a default Value. Where warps
// consist of whole rows, each merges its own first. Every row that is left has its own place in
// `scratch`, which has room for reduce_rows_scratch() values and is free again on return: one
// barrier per level is enough.
template <typename Value>
FASTBN_DEVICE Value reduce_rows(Value value, int rows, int row, int columns, int column,
                                Value* scratch) {
  if (kWarpThreads % columns == 0) {
    const int lane = gpu::thread_index() % kWarpThreads;
#pragma unroll 1
    for (int delta = kWarpThreads / 2; delta >= columns; delta /= 2) {
      const Value further = gpu::shuffle_down(value, delta);
      if (lane < delta) value.merge(further);
    }
    const int rows_per_warp = kWarpThreads / columns;
    rows = (rows + rows_per_warp - 1) / rows_per_warp;
    row = lane < columns ? gpu::thread_index() / kWarpThreads : rows;
  }
  while (rows > 1) {
    const int kept = (rows + 1) / 2;
    if (row >= kept && row < rows) scratch[(row - 1) * columns + column] = value;
    gpu::sync_block();
    if (row < rows - kept) value.merge(scratch[(row + kept - 1) * columns + column]);
    rows = kept;
  }
  gpu::sync_block();
  return value;
}

// Merges `lists` lists of `length` values, load(index, list) being one. Thread `list` returns the
// result of that list. A block has at least as many threads as there are lists.
template <typename Value, typename Load>
FASTBN_DEVICE Value reduce_lists(int length, int lists, Value* scratch, const Load& load) {
  const int threads_per_list = gpu::block_threads() / lists;
  const int rows = length < threads_per_list ? length : threads_per_list;
  const int row = gpu::thread_index() / lists;
  const int list = gpu::thread_index() % lists;
  Value value;
  if (row < rows) {
#pragma unroll 4
    for (int index = row; index < length; index += rows) value.merge(load(index, list));
  }
  return reduce_rows(value, rows, row, lists, list, scratch);
}

// Merges what the threads of a block have reduced, a Value of kLanes lanes each, over all rows of
// threads and all columns of a channel. Thread `channel` returns the result of that channel.
template <typename Mapping, typename Value>
FASTBN_DEVICE typename Value::Lane reduce_block(const Mapping& mapping, const Geometry& geometry,
                                                const Value& reduced, void* scratch) {
  using Lane = typename Value::Lane;
  const int columns = mapping.vectors() * Mapping::kLanes;
  const Value merged = reduce_rows(reduced, mapping.rows(), mapping.row(), mapping.vectors(),
                                   mapping.vector(), static_cast<Value*>(scratch));
  Lane* column_values = static_cast<Lane*>(scratch);
  if (mapping.row() == 0) {
#pragma unroll
    for (int lane = 0; lane < Mapping::kLanes; ++lane) {
      column_values[mapping.vector() * Mapping::kLanes + lane] = merged.lane(lane);
    }
  }
  gpu::sync_block();
  return reduce_lists<Lane>(
      geometry.repeats, geometry.tile_channels, column_values + columns,
      [&](int repeat, int channel) {
        return column_values[channel * geometry.channel_step + repeat * geometry.repeat_step];
      });
}

// Merges what all splits of a channel tile have reduced. False for all blocks but the one that
// comes last, where thread `channel` gets the result of that channel.
template <typename acc_t, typename Mapping, typename Value>
FASTBN_DEVICE bool reduce_splits(const Mapping& mapping, const Geometry& geometry,
                                 const Workspace& workspace, int64_t channels, Value& value,
                                 void* scratch) {
  if (geometry.splits == 1) return true;
  acc_t* partials = static_cast<acc_t*>(workspace.partials);
  const int64_t field_step = geometry.splits * channels;
  const int thread = gpu::thread_index();
  if (thread < mapping.channels()) {
    const int64_t at = mapping.split() * channels + mapping.first_channel() + thread;
#pragma unroll
    for (int f = 0; f < kNumbers<acc_t, Value>; ++f) {
      gpu::store<gpu::CacheHint::kKeep>(partials + f * field_step + at,
                                        numbers_of<acc_t>(value)[f]);
    }
  }
  // Each thread's partials before the block's arrival, and the arrivals before the last one's
  // reads.
  gpu::fence_device();
  gpu::sync_block();
  unsigned* arrived_before = static_cast<unsigned*>(scratch);
  const unsigned last = static_cast<unsigned>(geometry.splits - 1);
  if (thread == 0) {
    *arrived_before =
        gpu::atomic_inc_wrap(workspace.counters->tiles + mapping.channel_tile(), last);
  }
  gpu::sync_block();
  const bool is_last = *arrived_before == last;
  gpu::sync_block();
  if (!is_last) return false;
  gpu::fence_device();
  value = reduce_lists<Value>(
      geometry.splits, mapping.channels(), static_cast<Value*>(scratch),
      [&](int split, int channel) {
        const int64_t at = split * channels + mapping.first_channel() + channel;
        Value partial;
#pragma unroll
        for (int f = 0; f < kNumbers<acc_t, Value>; ++f) {
          numbers_of<acc_t>(partial)[f] = gpu::load_coherent(partials + f * field_step + at);
        }
        return partial;
      });
  return true;
}

}  // namespace fastbn::cuda
