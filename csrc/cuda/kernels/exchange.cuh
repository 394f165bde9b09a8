// SPDX-License-Identifier: BSD-3-Clause
//
// How the blocks of a team tell each other what they have gathered of a slab. In a cluster every
// block reads the messages of all; on a grid the block that comes last does, and tells the others:
// so that messages are read once and not by each. Whoever merges does so in the order of parts, and
// all get the same bits.
#pragma once

#include "../device/reduce.cuh"

namespace fastbn::cuda {

// What passes between blocks about the channels of a slab: two numbers at a time, of one channel
// after another.
template <typename acc_t, typename Value>
class Message {
 public:
  static constexpr int kPairs = Value::kFields / 2;
  static_assert(Value::kFields % 2 == 0 && Value::kFields <= kMessageNumbers);
  using Pair = gpu::Vector<acc_t, 2>;

  // Of `channels` channels, the how many-th at `memory`.
  FASTBN_DEVICE Message(void* memory, int channels, int64_t index)
      : pairs_(static_cast<Pair*>(memory) + index * kPairs * channels), channels_(channels) {}

  FASTBN_DEVICE Message of_peer(int part) const {
    return {gpu::peer_shared(pairs_, part), channels_, 0};
  }

  FASTBN_DEVICE void write_shared(int channel, const Value& value) const {
    write(value, [&](int pair, const Pair& numbers) { *place(pair, channel) = numbers; });
  }
  FASTBN_DEVICE Value read_shared(int channel) const {
    return read([&](int pair) { return *place(pair, channel); });
  }
  FASTBN_DEVICE void write_global(int channel, const Value& value) const {
    write(value, [&](int pair, const Pair& numbers) {
      gpu::store<gpu::Reuse::kLikely>(place(pair, channel), numbers);
    });
  }
  FASTBN_DEVICE Value read_global(int channel) const {
    return read([&](int pair) { return gpu::load_written(place(pair, channel)); });
  }

 private:
  FASTBN_DEVICE Pair* place(int pair, int channel) const {
    return pairs_ + pair * channels_ + channel;
  }

  template <typename Put>
  FASTBN_DEVICE static void write(const Value& value, const Put& put) {
    acc_t fields[Value::kFields];
    value.fields(fields);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) put(i, Pair{{fields[2 * i], fields[2 * i + 1]}});
  }
  template <typename Get>
  FASTBN_DEVICE static Value read(const Get& get) {
    acc_t fields[Value::kFields];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const Pair numbers = get(i);
      fields[2 * i] = numbers.elements[0];
      fields[2 * i + 1] = numbers.elements[1];
    }
    return Value::from(fields);
  }

  Pair* pairs_;
  int channels_;
};

// Blocks count themselves in; the last one lets all go on, which flips the top bit and leaves the
// count at zero: nobody has to reset anything.
class TeamBarrier {
 public:
  FASTBN_DEVICE TeamBarrier(unsigned* word, int blocks)
      : word_(word), blocks_(static_cast<unsigned>(blocks)) {}

  // For one thread of each block. Whether all others have arrived.
  FASTBN_DEVICE bool arrive() {
    before_ = gpu::add_acq_rel(word_, 1);
    return (before_ & ~kGo) == blocks_ - 1;
  }
  // For the last one.
  FASTBN_DEVICE void let_go() const { gpu::add_acq_rel(word_, kGo - blocks_); }
  // For those who are not.
  FASTBN_DEVICE void wait() const {
    while (((gpu::load_acquire(word_) ^ before_) & kGo) == 0) {
    }
  }

 private:
  static constexpr unsigned kGo = 0x80000000;

  unsigned* word_;
  unsigned blocks_;
  unsigned before_ = 0;
};

template <typename acc_t, typename Mapping, typename Value>
FASTBN_DEVICE Value exchange_in_cluster(const Mapping& mapping, const Geometry& geometry, int turn,
                                        const Value& value, void* scratch) {
  auto* shared = static_cast<unsigned char*>(gpu::shared_memory()) + geometry.residence.messages;
  const Message<acc_t, Value> own(shared, geometry.slab_channels, turn);
  const int thread = gpu::thread_index();
  if (thread < mapping.channels()) own.write_shared(thread, value);
  gpu::sync_cluster();
  return merge_lists<Value>(
      geometry.parts, mapping.channels(), static_cast<Value*>(scratch),
      [&](int part, int channel) { return own.of_peer(part).read_shared(channel); });
}

template <typename acc_t, typename Mapping, typename Value>
FASTBN_DEVICE Value exchange_on_grid(const Mapping& mapping, const Geometry& geometry,
                                     const Workspace& workspace, int team, int turn, Value value,
                                     void* scratch) {
  const int parts = geometry.parts;
  const auto message = [&](int index) {
    const int64_t first = (int64_t{team} * kTurns + turn) * (parts + 1);
    return Message<acc_t, Value>(workspace.partials, geometry.slab_channels, first + index);
  };
  const int thread = gpu::thread_index();
  const bool finishes = thread < mapping.channels();
  if (finishes) message(mapping.part()).write_global(thread, value);
  TeamBarrier barrier(workspace.barriers + team, parts);
  int* comes_last = static_cast<int*>(scratch);
  gpu::sync_block();
  if (thread == 0) {
    *comes_last = barrier.arrive();
    if (!*comes_last) barrier.wait();
  }
  gpu::sync_block();
  const bool is_last = *comes_last;
  gpu::sync_block();
  if (!is_last) return finishes ? message(parts).read_global(thread) : value;
  value =
      merge_lists<Value>(parts, mapping.channels(), static_cast<Value*>(scratch),
                         [&](int part, int channel) { return message(part).read_global(channel); });
  if (finishes) message(parts).write_global(thread, value);
  gpu::sync_block();
  if (thread == 0) barrier.let_go();
  return value;
}

// Merges what the blocks of a team have gathered. Thread `channel` has this block's value of that
// channel and gets that of all. `turn` alternates between 0 and 1.
template <typename acc_t, typename Mapping, typename Value>
FASTBN_DEVICE Value exchange(const Mapping& mapping, const Geometry& geometry,
                             const Workspace& workspace, int team, int turn, const Value& value,
                             void* scratch) {
  switch (geometry.residence.team) {
    case Team::kCluster:
      return exchange_in_cluster<acc_t>(mapping, geometry, turn, value, scratch);
    case Team::kGrid:
      return exchange_on_grid<acc_t>(mapping, geometry, workspace, team, turn, value, scratch);
    case Team::kBlock:
      break;
  }
  return value;
}

// Whose shared memory peers may still read stays until all have.
FASTBN_DEVICE void leave(const Geometry& geometry) {
  if (geometry.residence.team == Team::kCluster) gpu::sync_cluster();
}

}  // namespace fastbn::cuda
