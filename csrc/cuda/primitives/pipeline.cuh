// SPDX-License-Identifier: BSD-3-Clause
//
// The stages of a block's shared memory through which the tiles of its splits pass, one channel
// tile after another. While the block works on the tiles of one channel tile, copies of the
// following ones are on their way to all stages that are free.
#pragma once

#include "channel_values.cuh"
#include "thread_tile.cuh"

namespace fastbn::cuda {

// The pipeline of a kernel that reads `kTensors` activations.
template <typename Mapping, int kTensors>
class Pipeline {
 public:
  using scalar_t = typename Mapping::scalar_t;

  // All threads of the block call all of these.
  template <typename... Activations>
  FASTBN_DEVICE Pipeline(const Problem& problem, const Geometry& geometry, int cta_group, int split,
                         const Activations&... tensors)
      : problem_(problem),
        geometry_(geometry),
        tensors_{&tensors...},
        split_(split),
        range_(split_range(geometry, split)),
        next_channel_tile_(cta_group) {
    static_assert(sizeof...(Activations) == kTensors);
    const Persistence& persistence = geometry.persistence;
    if (gpu::thread_index() == 0) {
      const int arrivals = persistence.bulk_copies ? 1 : gpu::block_threads();
      for (int stage = 0; stage < persistence.stages; ++stage) {
        gpu::init_barrier(barrier(stage), arrivals);
      }
    }
    gpu::sync_block();
    for (int stage = 0; stage < persistence.stages; ++stage) producer_fill();
  }

  // The range of a tile, and that beyond the last tile.
  FASTBN_DEVICE Range tile(int index) const {
    const int64_t begin = range_.begin + int64_t{index} * geometry_.persistence.tile_extent;
    const int64_t end = begin + geometry_.persistence.tile_extent;
    return {begin < range_.end ? begin : range_.end, end < range_.end ? end : range_.end};
  }
  FASTBN_DEVICE Range rest() const { return {tile(geometry_.persistence.tiles).begin, range_.end}; }

  // Where a tile of the current channel tile is in shared memory.
  FASTBN_DEVICE unsigned char* smem(int tile) const { return place(stage_of(tile)); }

  // Waits until a tile of the current channel tile has arrived.
  FASTBN_DEVICE void consumer_wait(int tile) const {
    const bool wraps = first_stage_ + tile >= geometry_.persistence.stages;
    gpu::wait_barrier(barrier(stage_of(tile)), wraps ? parity_ ^ 1 : parity_);
  }

  // Releases the stage of the first tile that has not been released to a tile of a later channel
  // tile. Vector by vector a thread copies just what it has read itself, and need not wait for the
  // others.
  FASTBN_DEVICE void consumer_release() {
    if (geometry_.persistence.bulk_copies) gpu::sync_block();
    producer_fill();
  }

  // Goes on to the next channel tile, when all tiles of the current one have been released.
  FASTBN_DEVICE void advance() {
    first_stage_ += geometry_.persistence.tiles;
    if (first_stage_ < geometry_.persistence.stages) return;
    first_stage_ -= geometry_.persistence.stages;
    parity_ ^= 1;
  }

 private:
  FASTBN_DEVICE int stage_of(int tile) const {
    const int stage = first_stage_ + tile;
    const int stages = geometry_.persistence.stages;
    return stage < stages ? stage : stage - stages;
  }
  FASTBN_DEVICE unsigned char* place(int stage) const {
    return static_cast<unsigned char*>(gpu::shared_memory()) + geometry_.persistence.stages_offset +
           stage * kTensors * geometry_.persistence.tile_bytes;
  }
  FASTBN_DEVICE gpu::CopyBarrier* barrier(int stage) const {
    auto* shared = static_cast<unsigned char*>(gpu::shared_memory());
    return reinterpret_cast<gpu::CopyBarrier*>(shared + geometry_.persistence.barriers_offset) +
           stage;
  }

  // Starts to copy the next tile, of whatever channel tile, to the next stage.
  FASTBN_DEVICE void producer_fill() {
    if (next_channel_tile_ >= geometry_.channel_tiles) return;
    const Mapping mapping(problem_, geometry_, next_channel_tile_, split_);
    const Range range = tile(next_tile_);
    if (!geometry_.persistence.bulk_copies) {
      copy_vectors(mapping, range);
    } else if (gpu::thread_index() < kWarpThreads) {
      copy_bulk(mapping, range);
    }
    if (++next_stage_ == geometry_.persistence.stages) next_stage_ = 0;
    if (++next_tile_ < geometry_.persistence.tiles) return;
    next_tile_ = 0;
    next_channel_tile_ += geometry_.persistence.cta_groups;
  }

  FASTBN_DEVICE void copy_vectors(const Mapping& mapping, const Range& range) const {
    const auto copy = [&](const auto& thread_tile) {
#pragma unroll
      for (int tensor = 0; tensor < kTensors; ++tensor) {
        thread_tile.copy(tensor, *tensors_[tensor]);
      }
    };
    mapping.template for_each_in_smem<1>(range, place(next_stage_), copy);
    gpu::arrive_when_copied(barrier(next_stage_));
  }

  // Starts bulk copies of a tile's spans; the first warp alone calls it.
  FASTBN_DEVICE void copy_bulk(const Mapping& mapping, const Range& range) const {
    gpu::CopyBarrier* landed = barrier(next_stage_);
    const int lane = gpu::thread_index();
    if (lane == 0) gpu::expect_bytes(landed, kTensors * mapping.bulk_bytes(range));
    gpu::sync_warp();
    const int spans = mapping.bulk_spans(range);
    for (int i = lane; i < spans; i += kWarpThreads) {
      const BulkSpan span = mapping.bulk_span(range, i);
#pragma unroll
      for (int tensor = 0; tensor < kTensors; ++tensor) {
        gpu::bulk_copy(place(next_stage_) + tensor * geometry_.persistence.tile_bytes + span.place,
                       static_cast<const scalar_t*>(tensors_[tensor]->data) + span.offset,
                       span.bytes, landed);
      }
    }
  }

  const Problem& problem_;
  const Geometry& geometry_;
  const InputActivation* const tensors_[kTensors];
  const int split_;
  const Range range_;
  // The stage of the current channel tile's first tile, and the parity of the phase that waits for
  // it.
  int first_stage_ = 0;
  int parity_ = 0;
  // What producer_fill() copies next, and where to.
  int next_channel_tile_;
  int next_tile_ = 0;
  int next_stage_ = 0;
};

}  // namespace fastbn::cuda
