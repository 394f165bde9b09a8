// SPDX-License-Identifier: BSD-3-Clause
//
// How the blocks of a CTA group merge what they have reduced of a channel tile. In a cluster every
// block stores its partial results to the shared memory of all, and merges what it gets; on a grid
// the block that comes last merges, and passes the result to the others: so that partial results
// are read once and not by each. Whoever merges does so in the order of splits, and all get the
// same bits.
#pragma once

#include "../gpu/store_async.cuh"
#include "block_reduce.cuh"

namespace fastbn::cuda {

// The partial results of a block, one Value per channel, where other blocks read them: two numbers
// at a time, of one channel after another.
template <typename acc_t, typename Value>
class GroupPartials {
 public:
  static constexpr int kPairs = kNumbers<acc_t, Value> / 2;
  static_assert(kPairs * 2 == kNumbers<acc_t, Value> && 2 * kPairs <= kMomentsNumbers);
  using Pair = gpu::Vector<acc_t, 2>;

  // The `index`-th of those that lie one after another at `memory`, each of `channels` channels.
  FASTBN_DEVICE GroupPartials(void* memory, int channels, int64_t index)
      : pairs_(static_cast<Pair*>(memory) + index * kPairs * channels), channels_(channels) {}

  // To where a block of the cluster has this place; its barrier counts kBytes for each channel.
  static constexpr int kBytes = kPairs * sizeof(Pair);
  FASTBN_DEVICE void store_to_peer(int rank, int channel, const Value& value,
                                   gpu::CopyBarrier* barrier) const {
    write(value, [&](int pair, const Pair& numbers) {
      gpu::store_async(place(pair, channel), rank, numbers, barrier);
    });
  }
  FASTBN_DEVICE Value read_shared(int channel) const {
    return read([&](int pair) { return gpu::load_shared(place(pair, channel)); });
  }
  FASTBN_DEVICE void write_global(int channel, const Value& value) const {
    write(value, [&](int pair, const Pair& numbers) {
      gpu::store<gpu::CacheHint::kKeep>(place(pair, channel), numbers);
    });
  }
  FASTBN_DEVICE Value read_global(int channel) const {
    return read([&](int pair) { return gpu::load_coherent(place(pair, channel)); });
  }

 private:
  FASTBN_DEVICE Pair* place(int pair, int channel) const {
    return pairs_ + pair * channels_ + channel;
  }

  template <typename Put>
  FASTBN_DEVICE static void write(const Value& value, const Put& put) {
    const acc_t* numbers = numbers_of<acc_t>(value);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) put(i, Pair{{numbers[2 * i], numbers[2 * i + 1]}});
  }
  template <typename Get>
  FASTBN_DEVICE static Value read(const Get& get) {
    Value value;
    acc_t* numbers = numbers_of<acc_t>(value);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const Pair pair = get(i);
      numbers[2 * i] = pair.elements[0];
      numbers[2 * i + 1] = pair.elements[1];
    }
    return value;
  }

  Pair* pairs_;
  int channels_;
};

// A barrier of blocks. They count themselves in; the last one lets all go on, which flips the top
// bit and leaves the count at zero: nobody has to reset anything.
class GridBarrier {
 public:
  FASTBN_DEVICE GridBarrier(unsigned* word, int blocks)
      : word_(word), blocks_(static_cast<unsigned>(blocks)) {}

  // One thread of each block arrives. Returns whether all other blocks have.
  FASTBN_DEVICE bool arrive() {
    before_ = gpu::add_acq_rel(word_, 1);
    return (before_ & ~kGo) == blocks_ - 1;
  }
  // The block that arrived last lets the others go on.
  FASTBN_DEVICE void let_go() const { gpu::add_acq_rel(word_, kGo - blocks_); }
  // The others wait for that.
  FASTBN_DEVICE void wait() const {
    while (((gpu::load_relaxed(word_) ^ before_) & kGo) == 0) {
    }
    gpu::load_acquire(word_);  // once, as it costs the multiprocessor its cache
  }

 private:
  static constexpr unsigned kGo = 0x80000000;

  unsigned* word_;
  unsigned blocks_;
  unsigned before_ = 0;
};

// The barrier of a phase, in front of the partial results in shared memory.
FASTBN_DEVICE gpu::CopyBarrier* partials_barrier(const Geometry& geometry, int phase) {
  auto* shared = static_cast<unsigned char*>(gpu::shared_memory());
  return reinterpret_cast<gpu::CopyBarrier*>(shared + geometry.persistence.partials_offset) + phase;
}

// Before the first group_reduce(); all threads of the block call it.
FASTBN_DEVICE void begin_group_reduce(const Geometry& geometry) {
  if (geometry.persistence.cta_group != CtaGroup::kCluster) return;
  if (gpu::thread_index() == 0) {
    for (int phase = 0; phase < kPhases; ++phase) {
      gpu::init_barrier(partials_barrier(geometry, phase), 1);
    }
  }
  gpu::sync_cluster();
}

// Nobody waits for a block to have read what it got: who stores for the next but one has got the
// block's results for the next, which it stored after reading.
template <typename acc_t, typename Mapping, typename Value>
FASTBN_DEVICE Value cluster_reduce(const Mapping& mapping, const Geometry& geometry, int round,
                                   const Value& value, void* scratch) {
  using Partials = GroupPartials<acc_t, Value>;
  const int splits = geometry.splits;
  const int phase = round % kPhases;
  gpu::CopyBarrier* barrier = partials_barrier(geometry, phase);
  void* places = partials_barrier(geometry, kPhases);
  const auto partials = [&](int split) {
    return Partials(places, geometry.tile_channels, phase * splits + split);
  };
  const int thread = gpu::thread_index();
  if (thread == 0) {
    gpu::expect_bytes(barrier, splits * mapping.channels() * Partials::kBytes);
  }
  if (thread < mapping.channels()) {
#pragma unroll 1
    for (int rank = 0; rank < splits; ++rank) {
      partials(mapping.split()).store_to_peer(rank, thread, value, barrier);
    }
  }
  // Who reads below.
  if (thread < splits * mapping.channels()) {
    gpu::wait_barrier_cluster(barrier, round / kPhases % 2);
  }
  return reduce_lists<Value>(
      splits, mapping.channels(), static_cast<Value*>(scratch),
      [&](int split, int channel) { return partials(split).read_shared(channel); });
}

template <typename acc_t, typename Mapping, typename Value>
FASTBN_DEVICE Value grid_reduce(const Mapping& mapping, const Geometry& geometry,
                                const Workspace& workspace, int cta_group, int round, Value value,
                                void* scratch) {
  const int splits = geometry.splits;
  const int phase = round % kPhases;
  // Partial results of a split by its index; behind the last split, the result of all.
  const auto partials = [&](int index) {
    const int64_t first = (int64_t{cta_group} * kPhases + phase) * (splits + 1);
    return GroupPartials<acc_t, Value>(workspace.partials, geometry.tile_channels, first + index);
  };
  const int thread = gpu::thread_index();
  const bool has_channel = thread < mapping.channels();
  if (has_channel) partials(mapping.split()).write_global(thread, value);
  GridBarrier barrier(workspace.counters->barriers + cta_group, splits);
  int* comes_last = static_cast<int*>(scratch);
  gpu::sync_block();
  if (thread == 0) {
    *comes_last = barrier.arrive();
    if (!*comes_last) barrier.wait();
  }
  gpu::sync_block();
  const bool is_last = *comes_last;
  gpu::sync_block();
  if (!is_last) return has_channel ? partials(splits).read_global(thread) : value;
  value = reduce_lists<Value>(
      splits, mapping.channels(), static_cast<Value*>(scratch),
      [&](int split, int channel) { return partials(split).read_global(channel); });
  if (has_channel) partials(splits).write_global(thread, value);
  gpu::sync_block();
  if (thread == 0) barrier.let_go();
  return value;
}

// Merges what the blocks of a CTA group have reduced. Thread `channel` has this block's value of
// that channel and gets that of all. `round` counts the channel tiles of the group.
template <typename acc_t, typename Mapping, typename Value>
FASTBN_DEVICE Value group_reduce(const Mapping& mapping, const Geometry& geometry,
                                 const Workspace& workspace, int cta_group, int round,
                                 const Value& value, void* scratch) {
  switch (geometry.persistence.cta_group) {
    case CtaGroup::kCluster:
      return cluster_reduce<acc_t>(mapping, geometry, round, value, scratch);
    case CtaGroup::kGrid:
      return grid_reduce<acc_t>(mapping, geometry, workspace, cta_group, round, value, scratch);
    case CtaGroup::kBlock:
      break;
  }
  return value;
}

}  // namespace fastbn::cuda
