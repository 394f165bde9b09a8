// SPDX-License-Identifier: BSD-3-Clause
//
// Merging what threads and blocks have gathered, always in the same order: results are bitwise the
// same from run to run.
#pragma once

#include "../geometry.h"
#include "gpu.cuh"

namespace fastbn::cuda {

// Merges the values of all rows of threads, column by column, as a tree. Row 0 returns the result.
// All threads of the block call this; those with row >= rows have nothing to add, and a Value says
// so. Where warps consist of whole rows, each merges its own first. Every row that is left has its
// own place in `scratch`, which is free again on return: one barrier per level is enough.
template <typename Value>
FASTBN_DEVICE Value reduce_rows(Value value, int rows, int row, int columns, int column,
                                Value* scratch) {
  if (gpu::kWarpThreads % columns == 0) {
    const int lane = gpu::thread_index() % gpu::kWarpThreads;
#pragma unroll 1
    for (int delta = gpu::kWarpThreads / 2; delta >= columns; delta /= 2) {
      const Value further = gpu::shuffle_down(value, delta);
      if (lane < delta) value.merge(further);
    }
    const int rows_per_warp = gpu::kWarpThreads / columns;
    rows = (rows + rows_per_warp - 1) / rows_per_warp;
    row = lane < columns ? gpu::thread_index() / gpu::kWarpThreads : rows;
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

// Merges `lists` lists of `length` values, fetch(index, list) being one. Thread `list` returns the
// result of that list. A block has at least as many threads as there are lists.
template <typename Value, typename Fetch>
FASTBN_DEVICE Value merge_lists(int length, int lists, Value* scratch, const Fetch& fetch) {
  const int threads_per_list = gpu::block_threads() / lists;
  const int rows = length < threads_per_list ? length : threads_per_list;
  const int row = gpu::thread_index() / lists;
  const int list = gpu::thread_index() % lists;
  Value value;
  if (row < rows) {
#pragma unroll 4
    for (int index = row; index < length; index += rows) value.merge(fetch(index, list));
  }
  return reduce_rows(value, rows, row, lists, list, scratch);
}

// Merges what the threads of a block have gathered, a Value of kLanes lanes each, over all rows of
// threads and all columns of a channel. Thread `channel` returns the result of that channel.
template <typename Mapping, typename Value>
FASTBN_DEVICE typename Value::Lane merge_block(const Mapping& mapping, const Geometry& geometry,
                                               const Value& gathered, void* scratch) {
  using Lane = typename Value::Lane;
  const int columns = mapping.vectors() * Mapping::kLanes;
  const Value merged = reduce_rows(gathered, mapping.rows(), mapping.row(), mapping.vectors(),
                                   mapping.vector(), static_cast<Value*>(scratch));
  Lane* column_values = static_cast<Lane*>(scratch);
  if (mapping.row() == 0) {
#pragma unroll
    for (int lane = 0; lane < Mapping::kLanes; ++lane) {
      column_values[mapping.vector() * Mapping::kLanes + lane] = merged.lane(lane);
    }
  }
  gpu::sync_block();
  return merge_lists<Lane>(
      geometry.repeats, geometry.slab_channels, column_values + columns,
      [&](int repeat, int channel) {
        return column_values[channel * geometry.channel_step + repeat * geometry.repeat_step];
      });
}

// Merges what all parts of a slab have gathered. False for all blocks but the one that comes last,
// where thread `channel` gets the result of that channel.
template <typename acc_t, typename Mapping, typename Lane>
FASTBN_DEVICE bool merge_parts(const Mapping& mapping, const Geometry& geometry,
                               const Workspace& workspace, int64_t channels, Lane& value,
                               void* scratch) {
  if (geometry.parts == 1) return true;
  acc_t* partials = static_cast<acc_t*>(workspace.partials);
  const int64_t field_step = geometry.parts * channels;
  const int thread = gpu::thread_index();
  if (thread < mapping.channels()) {
    acc_t fields[Lane::kFields];
    value.fields(fields);
    const int64_t at = mapping.part() * channels + mapping.first_channel() + thread;
#pragma unroll
    for (int f = 0; f < Lane::kFields; ++f) {
      gpu::store<gpu::Reuse::kLikely>(partials + f * field_step + at, fields[f]);
    }
  }
  // Each thread's partials before the block's arrival, and the arrivals before the last one's
  // reads.
  gpu::fence_device();
  gpu::sync_block();
  unsigned* arrived_before = static_cast<unsigned*>(scratch);
  const unsigned last = static_cast<unsigned>(geometry.parts - 1);
  if (thread == 0) *arrived_before = gpu::count_up(workspace.counters + mapping.slab(), last);
  gpu::sync_block();
  const bool is_last = *arrived_before == last;
  gpu::sync_block();
  if (!is_last) return false;
  gpu::fence_device();
  value = merge_lists<Lane>(
      geometry.parts, mapping.channels(), static_cast<Lane*>(scratch), [&](int part, int channel) {
        const int64_t at = part * channels + mapping.first_channel() + channel;
        acc_t fields[Lane::kFields];
#pragma unroll
        for (int f = 0; f < Lane::kFields; ++f) {
          fields[f] = gpu::load_written(partials + f * field_step + at);
        }
        return Lane::from(fields);
      });
  return true;
}

}  // namespace fastbn::cuda
