// SPDX-License-Identifier: BSD-3-Clause
//
// The slots of a block's shared memory where stages of its parts reside, one slab after another.
// While the block works on the stages of one slab, copies of the following ones are on their way to
// all slots that are free.
#pragma once

#include "../device/chunk.cuh"

namespace fastbn::cuda {

// For kernels that read kTensors activations.
template <typename Mapping, int kTensors>
class Ring {
 public:
  using scalar_t = typename Mapping::scalar_t;

  // All threads of the block call all of these.
  FASTBN_DEVICE Ring(const Problem& problem, const Geometry& geometry, int team, int part,
                     const Activation& first, const Activation& second)
      : problem_(problem),
        geometry_(geometry),
        first_(first),
        second_(second),
        part_(part),
        items_(part_items(geometry, part)),
        next_slab_(team) {
    const Residence& residence = geometry.residence;
    if (gpu::thread_index() == 0) {
      const int arrivals = residence.in_bulk ? 1 : gpu::block_threads();
      for (int slot = 0; slot < residence.slots; ++slot) gpu::init_barrier(barrier(slot), arrivals);
    }
    gpu::sync_block();
    for (int slot = 0; slot < residence.slots; ++slot) fill();
  }

  // The items of a stage, and those that do not reside.
  FASTBN_DEVICE Items stage(int index) const {
    const int64_t begin = items_.begin + int64_t{index} * geometry_.residence.stage_items;
    const int64_t end = begin + geometry_.residence.stage_items;
    return {begin < items_.end ? begin : items_.end, end < items_.end ? end : items_.end};
  }
  FASTBN_DEVICE Items rest() const { return {stage(geometry_.residence.stages).begin, items_.end}; }

  // Where a stage of the current slab resides.
  FASTBN_DEVICE unsigned char* held(int stage) const { return place(slot_of(stage)); }

  // Waits until a stage of the current slab has arrived.
  FASTBN_DEVICE void wait(int stage) const {
    const bool wraps = first_slot_ + stage >= geometry_.residence.slots;
    gpu::wait_barrier(barrier(slot_of(stage)), wraps ? parity_ ^ 1 : parity_);
  }

  // Gives the slot of the first stage that has not been given up to a stage of a later slab. Vector
  // by vector a thread copies just what it has read itself, and need not wait for the others.
  FASTBN_DEVICE void give_up() {
    if (geometry_.residence.in_bulk) gpu::sync_block();
    fill();
  }

  // All stages of the current slab have been given up.
  FASTBN_DEVICE void next_slab() {
    first_slot_ += geometry_.residence.stages;
    if (first_slot_ < geometry_.residence.slots) return;
    first_slot_ -= geometry_.residence.slots;
    parity_ ^= 1;
  }

 private:
  FASTBN_DEVICE int slot_of(int stage) const {
    const int slot = first_slot_ + stage;
    return slot < geometry_.residence.slots ? slot : slot - geometry_.residence.slots;
  }
  FASTBN_DEVICE unsigned char* place(int slot) const {
    return static_cast<unsigned char*>(gpu::shared_memory()) + geometry_.residence.ring +
           slot * kTensors * geometry_.residence.stage_bytes;
  }
  FASTBN_DEVICE gpu::CopyBarrier* barrier(int slot) const {
    auto* shared = static_cast<unsigned char*>(gpu::shared_memory());
    return reinterpret_cast<gpu::CopyBarrier*>(shared + geometry_.residence.barriers) + slot;
  }

  // Starts to copy the next stage, of whatever slab, to the next slot.
  FASTBN_DEVICE void fill() {
    if (next_slab_ >= geometry_.slabs) return;
    const Mapping mapping(problem_, geometry_, next_slab_, part_);
    const Items items = stage(next_stage_);
    if (!geometry_.residence.in_bulk) {
      copy_vectors(mapping, items);
    } else if (gpu::thread_index() < gpu::kWarpThreads) {
      copy_runs(mapping, items);
    }
    if (++next_slot_ == geometry_.residence.slots) next_slot_ = 0;
    if (++next_stage_ < geometry_.residence.stages) return;
    next_stage_ = 0;
    next_slab_ += geometry_.residence.teams;
  }

  FASTBN_DEVICE void copy_vectors(const Mapping& mapping, const Items& items) const {
    const auto copy = [&](const auto& chunk) {
      chunk.template copy<0>(first_);
      if (kTensors > 1) chunk.template copy<1>(second_);
    };
    mapping.template for_each_held<1>(items, place(next_slot_), copy);
    gpu::arrive_when_copied(barrier(next_slot_));
  }

  // By one warp.
  FASTBN_DEVICE void copy_runs(const Mapping& mapping, const Items& items) const {
    gpu::CopyBarrier* landed = barrier(next_slot_);
    const int lane = gpu::thread_index();
    if (lane == 0) gpu::expect_bytes(landed, kTensors * mapping.bytes(items));
    gpu::sync_warp();
    const int runs = mapping.runs(items);
    for (int i = lane; i < runs; i += gpu::kWarpThreads) {
      const Run run = mapping.run(items, i);
      unsigned char* to = place(next_slot_) + run.place;
      gpu::bulk_copy(to, static_cast<const scalar_t*>(first_.data) + run.offset, run.bytes, landed);
      if (kTensors > 1) {
        gpu::bulk_copy(to + geometry_.residence.stage_bytes,
                       static_cast<const scalar_t*>(second_.data) + run.offset, run.bytes, landed);
      }
    }
  }

  const Problem& problem_;
  const Geometry& geometry_;
  const Activation& first_;
  const Activation& second_;
  const int part_;
  const Items items_;
  // The slot of the current slab's first stage, and the parity of the phase that waits for it.
  int first_slot_ = 0;
  int parity_ = 0;
  // What fill() does.
  int next_slab_;
  int next_stage_ = 0;
  int next_slot_ = 0;
};

}  // namespace fastbn::cuda
