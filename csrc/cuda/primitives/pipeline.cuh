// SPDX-License-Identifier: BSD-3-Clause
//
// The stages of a block's shared memory through which the tiles of its splits pass, one channel
// tile after another. While the block works on the tiles of one channel tile, copies of the
// following ones are on their way to all stages that are free.
//
// In bulk, a producer warp waits for consumers stage by stage, and they never for each other. It
// moves a tile by spans of adjacent elements or, where these are short, by a box and what rows the
// tile has more than that. Vector by vector, a thread fills a stage with just what it reads itself,
// without waiting for others.
#pragma once

#include "../gpu/bulk_store.cuh"
#include "../gpu/tensor_map.cuh"
#include "channel_values.cuh"
#include "thread_tile.cuh"

namespace fastbn::cuda {

// The boxes of activations, `kTensors` of which are read, for TileCopies::kBoxes.
template <int kTensors>
struct TileMaps {
  gpu::TensorMap in[kTensors];
  gpu::TensorMap out;
};

// The pipeline of a kernel that reads `kTensors` activations.
template <typename Mapping, int kTensors>
class Pipeline {
 public:
  using scalar_t = typename Mapping::scalar_t;

  // All threads of the block call it.
  FASTBN_DEVICE Pipeline(const Problem& problem, const Geometry& geometry, int cta_group, int split,
                         const Inputs<kTensors>& inputs, const TileMaps<kTensors>& maps)
      : problem_(problem),
        geometry_(geometry),
        inputs_(inputs),
        maps_(maps),
        split_(split),
        range_(split_range(geometry, split)),
        next_channel_tile_(cta_group) {
    const Persistence& persistence = geometry.persistence;
    const int longer = range_.count() - persistence.tiles * (persistence.tile_extent - 1);
    longer_tiles_ = longer < persistence.tiles ? longer : persistence.tiles;
    if (gpu::thread_index() == 0) {
      for (int stage = 0; stage < persistence.stages; ++stage) {
        gpu::init_barrier(full(stage), is_in_bulk() ? 1 : geometry.threads);
        gpu::init_barrier(empty(stage), geometry.threads / kWarpThreads);
      }
    }
    gpu::sync_block();
    if (is_in_bulk() && !is_producer()) return;
    for (int stage = 0; stage < persistence.stages; ++stage) fill();
  }

  // Whether the copy engine moves tiles.
  FASTBN_DEVICE bool is_in_bulk() const {
    return geometry_.persistence.copies != TileCopies::kVectors;
  }

  // Whether this thread belongs to the producer warp.
  FASTBN_DEVICE bool is_producer() const { return gpu::thread_index() >= geometry_.threads; }

  // The range of a tile, and that beyond the last tile.
  FASTBN_DEVICE Range tile(int index) const { return {tile_begin(index), tile_begin(index + 1)}; }
  FASTBN_DEVICE Range rest() const { return {tile_begin(geometry_.persistence.tiles), range_.end}; }

  // Where a tile of the current channel tile is in shared memory.
  FASTBN_DEVICE unsigned char* smem(int tile) const { return place(stage_of(tile)); }

  // Waits until a tile of the current channel tile has arrived.
  FASTBN_DEVICE void consumer_wait(int tile) const {
    gpu::wait_barrier(full(stage_of(tile)), parity_of(tile));
  }

  // In bulk: a warp of consumers has left the results of a tile in its place.
  FASTBN_DEVICE void consumer_release(int tile) const {
    gpu::fence_async_proxy();
    gpu::sync_warp();
    if (gpu::thread_index() % kWarpThreads == 0) gpu::arrive(empty(stage_of(tile)));
  }

  // In bulk: the producer stores the tiles that consumers release, and fills their stages with
  // tiles of a later channel tile, each while the next one is on its way to memory.
  FASTBN_DEVICE void producer_store(const Mapping& mapping, const OutputActivation& to) {
#pragma unroll 1
    for (int tile = 0; tile < geometry_.persistence.tiles; ++tile) {
      gpu::wait_barrier(empty(stage_of(tile)), parity_of(tile));
      store_bulk(mapping, this->tile(tile), smem(tile), to);
      if (tile > 0) {
        gpu::wait_bulk_stores_read<1>();
        gpu::sync_warp();
        fill();
      }
    }
    gpu::wait_bulk_stores_read<0>();
    gpu::sync_warp();
    fill();
  }

  // Starts to copy the next tile, of whatever channel tile, to the next stage, which is free: the
  // producer calls it or, vector by vector, each thread that has taken its vectors from there.
  FASTBN_DEVICE void fill() {
    if (next_channel_tile_ >= geometry_.channel_tiles) return;
    const Mapping mapping(problem_, geometry_, next_channel_tile_, split_);
    const Range range = tile(next_tile_);
    if (is_in_bulk()) {
      copy_bulk(mapping, range);
    } else {
      copy_vectors(mapping, range);
    }
    if (++next_stage_ == geometry_.persistence.stages) next_stage_ = 0;
    if (++next_tile_ < geometry_.persistence.tiles) return;
    next_tile_ = 0;
    next_channel_tile_ += geometry_.persistence.cta_groups;
  }

  // Goes on to the next channel tile, when all tiles of the current one have been released.
  FASTBN_DEVICE void advance() {
    first_stage_ += geometry_.persistence.tiles;
    if (first_stage_ < geometry_.persistence.stages) return;
    first_stage_ -= geometry_.persistence.stages;
    parity_ ^= 1;
  }

 private:
  FASTBN_DEVICE int64_t tile_begin(int index) const {
    const int longer = index < longer_tiles_ ? index : longer_tiles_;
    return range_.begin + index * (geometry_.persistence.tile_extent - 1) + longer;
  }
  FASTBN_DEVICE int stage_of(int tile) const {
    const int stage = first_stage_ + tile;
    const int stages = geometry_.persistence.stages;
    return stage < stages ? stage : stage - stages;
  }
  // Of the phase in which a tile arrives and is released.
  FASTBN_DEVICE int parity_of(int tile) const {
    return first_stage_ + tile >= geometry_.persistence.stages ? parity_ ^ 1 : parity_;
  }
  FASTBN_DEVICE unsigned char* place(int stage) const {
    return static_cast<unsigned char*>(gpu::shared_memory()) + geometry_.persistence.stages_offset +
           stage * kTensors * geometry_.persistence.tile_bytes;
  }

  // The barriers of a stage: its tile has arrived, and consumers have released it.
  FASTBN_DEVICE gpu::CopyBarrier* full(int stage) const { return barriers() + stage; }
  FASTBN_DEVICE gpu::CopyBarrier* empty(int stage) const {
    return barriers() + geometry_.persistence.stages + stage;
  }
  FASTBN_DEVICE gpu::CopyBarrier* barriers() const {
    static_assert(sizeof(gpu::CopyBarrier) == kBarrierBytes);
    auto* shared = static_cast<unsigned char*>(gpu::shared_memory());
    return reinterpret_cast<gpu::CopyBarrier*>(shared + geometry_.persistence.barriers_offset);
  }

  FASTBN_DEVICE void copy_vectors(const Mapping& mapping, const Range& range) const {
    const auto copy = [&](const auto& thread_tile) {
#pragma unroll
      for (int tensor = 0; tensor < kTensors; ++tensor) {
        thread_tile.copy(tensor, *inputs_.tensors[tensor]);
      }
    };
    mapping.template for_each_in_smem<1, false>(range, place(next_stage_), copy);
    gpu::arrive_when_copied(full(next_stage_));
  }

  // A tile begins with its box, if it has one. The rest is spans.
  FASTBN_DEVICE void copy_bulk(const Mapping& mapping, const Range& range) const {
    gpu::CopyBarrier* landed = full(next_stage_);
    const Range spans = beyond_box(range);
    const int box = box_bytes(mapping);
    if (lane() == 0) {
      gpu::expect_bytes(landed, kTensors * (box + mapping.bulk_bytes(spans)));
      if constexpr (Mapping::kHasBoxes) {
        for (int tensor = 0; box > 0 && tensor < kTensors; ++tensor) {
          gpu::bulk_copy_2d(place_of(tensor), &maps_.in[tensor], mapping.box_column(),
                            static_cast<int>(range.begin), landed);
        }
      }
    }
    gpu::sync_warp();
    for_each_span(mapping, spans, [&](const BulkSpan& span) {
#pragma unroll
      for (int tensor = 0; tensor < kTensors; ++tensor) {
        gpu::bulk_copy(place_of(tensor) + box + span.place,
                       static_cast<const scalar_t*>(inputs_.tensors[tensor]->data) + span.offset,
                       span.bytes, landed);
      }
    });
  }

  FASTBN_DEVICE void store_bulk(const Mapping& mapping, const Range& range,
                                const unsigned char* from, const OutputActivation& to) const {
    const int box = box_bytes(mapping);
    if constexpr (Mapping::kHasBoxes) {
      if (box > 0 && lane() == 0) {
        gpu::bulk_store_2d(&maps_.out, mapping.box_column(), static_cast<int>(range.begin), from);
      }
    }
    for_each_span(mapping, beyond_box(range), [&](const BulkSpan& span) {
      gpu::bulk_store(static_cast<scalar_t*>(to.data) + span.offset, from + box + span.place,
                      span.bytes);
    });
    gpu::commit_bulk_stores();
  }

  FASTBN_DEVICE static int box_bytes([[maybe_unused]] const Mapping& mapping) {
    if constexpr (Mapping::kHasBoxes) return mapping.box_bytes();
    return 0;
  }
  FASTBN_DEVICE Range beyond_box(const Range& tile) const {
    const int box_rows = Mapping::kHasBoxes ? geometry_.persistence.box_rows : 0;
    return {tile.begin + box_rows, tile.end};
  }
  // Where the next tile of an activation goes.
  FASTBN_DEVICE unsigned char* place_of(int tensor) const {
    return place(next_stage_) + tensor * geometry_.persistence.tile_bytes;
  }

  // Shares out spans among the lanes of the producer warp.
  template <typename Take>
  FASTBN_DEVICE void for_each_span(const Mapping& mapping, const Range& range,
                                   const Take& take) const {
    const int spans = mapping.bulk_spans(range);
#pragma unroll 1
    for (int i = lane(); i < spans; i += kWarpThreads) take(mapping.bulk_span(range, i));
  }
  FASTBN_DEVICE static int lane() { return gpu::thread_index() % kWarpThreads; }

  const Problem& problem_;
  const Geometry& geometry_;
  const Inputs<kTensors> inputs_;
  const TileMaps<kTensors>& maps_;
  const int split_;
  const Range range_;
  int longer_tiles_;  // those of tile_extent, before those of one fewer
  // The stage of the current channel tile's first tile, and the parity of the phase that waits for
  // it.
  int first_stage_ = 0;
  int parity_ = 0;
  // What fill() copies next, and where to.
  int next_channel_tile_;
  int next_tile_ = 0;
  int next_stage_ = 0;
};

}  // namespace fastbn::cuda
