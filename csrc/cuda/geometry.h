// SPDX-License-Identifier: BSD-3-Clause
//
// How blocks and threads share out an activation: the part of a plan that kernels read. Plain
// numbers, filled by mapping.cpp and candidates.cpp.
//
// A slab is what one block can keep statistics of: some channels, whole. All parts of a slab hold
// the same channels and different elements; a block does one part of one slab. On chip, the blocks
// that do the parts of a slab are a team, and one team does several slabs, one after another.
#pragma once

#include <cstdint>

namespace fastbn::cuda {

constexpr int kVectorBytes = 16;

// The most threads of a block.
constexpr int kMaxThreads = 512;

// How much of an SM a mapping's kernels are compiled for: blocks that fit its registers at once,
// and vectors that a thread has in flight, over all tensors it reads.
//
// An H200 needs about 32 KiB in flight per SM to keep its memory busy (4.8 TB/s times 0.9 us of
// latency under load, over 132 SMs). Mappings of vectors have twice that, so that an SM half filled
// still has enough:
//
//   columns    1 block  * 512 threads * 8 vectors * 16 bytes = 64 KiB; statistics of 8 channels
//              take most of the 128 registers of a thread
//   segments   2 blocks * 512 threads * 4 vectors * 16 bytes = 64 KiB
struct Occupancy {
  int blocks;
  int loads;
};
constexpr Occupancy kColumnsOccupancy{1, 8};
constexpr Occupancy kSegmentsOccupancy{2, 4};
// Strides take registers, and an element is no vector: no promise.
constexpr Occupancy kStridedOccupancy{1, 1};

// Kernels that keep tensors on chip have all registers for one full block; smaller ones share them.
constexpr int kOnChipBlocks = 1;

constexpr int bytes_in_flight(Occupancy occupancy) {
  return occupancy.blocks * kMaxThreads * occupancy.loads * kVectorBytes;
}
static_assert(bytes_in_flight(kColumnsOccupancy) >= 2 * (32 << 10));
static_assert(bytes_in_flight(kSegmentsOccupancy) >= 2 * (32 << 10));

enum class Mapping : int8_t {
  // The activation is a matrix whose columns each belong to one channel, and a thread has a vector
  // of adjacent columns: channels last, and contiguous channels too small for whole vectors.
  kColumns,
  // A slab is one channel, a segment of adjacent elements in each sample, and a thread has vectors
  // of its elements: contiguous.
  kSegments,
  // Like kSegments, one element at a time at any strides.
  kStrided,
};

// Divides by a number that is known before the launch, by one multiplication (Granlund and
// Montgomery, "Division by invariant integers using multiplication", 1994).
struct Divider {
  uint32_t divisor = 1;
  uint32_t multiplier = 1;
  int32_t shift = 0;
};

// How blocks of a team tell each other what they have gathered.
enum class Team : int8_t {
  kBlock,    // there is one
  kCluster,  // they are a thread-block cluster and see each other's shared memory
  kGrid,     // by global memory; all teams of the launch live at once
};

// What is kept in shared memory between gathering and applying. A part's first items, in stages of
// equally many, are copied to a ring of slots and stay there until they have been applied; then the
// slot takes a stage of the next slab. Items that the ring has no room for are read twice.
struct Residence {
  Team team = Team::kBlock;
  int32_t teams = 0;  // block = team * parts + part; a team does every teams-th slab
  int32_t stage_items = 0;
  int32_t stages = 0;       // of a part
  int32_t slots = 0;        // as many or more
  bool in_bulk = false;     // by the copy engine, run by run; otherwise vector by vector
  int32_t messages = 0;     // where things lie in shared memory, in bytes: what the team is told,
  int32_t barriers = 0;     // one for each slot,
  int32_t ring = 0;         // and the slots,
  int32_t stage_bytes = 0;  // of one tensor each; a slot has one of each tensor
};

struct Geometry {
  Mapping mapping = Mapping::kColumns;
  int32_t width = 1;  // elements of a vector
  int32_t slabs = 0;
  int32_t parts = 0;          // of a slab; where nothing resides block = part * slabs + slab
  int32_t slab_channels = 1;  // the last slab may have fewer
  // What the parts of a slab share: rows of the matrix, windows or elements of the channel.
  int64_t items = 0;

  // kColumns: column = channel * channel_step + repeat * repeat_step, counted within the slab.
  int64_t matrix_columns = 0;
  int32_t vectors = 1;  // of a slab, side by side
  int32_t repeats = 1;  // columns of a channel
  int32_t channel_step = 1;
  int32_t repeat_step = 0;

  // kSegments: a window is one aligned vector of a segment, which may reach past either end.
  Divider windows;  // of a segment

  Residence residence;
};

// Vectors that a thread takes from shared memory at once, over all tensors it reads: enough for 16
// warps to hide the latency, and stages of no more are small.
constexpr int kHeldVectors = 2;

// Shared memory of a block: coefficients of its channels (kCoefficients numbers each), then room to
// merge what threads, columns and parts have gathered.
constexpr int kCoefficients = 4;

// Numbers that statistics of `lanes` channels consist of: a count, means and squared deviations.
constexpr int gathered_numbers(int lanes) { return 1 + 2 * lanes; }

// Per-channel results of the parts, and what the first kernel leaves to the second.
struct Workspace {
  unsigned* counters;  // one per slab, zero between launches
  unsigned* barriers;  // one per team; see exchange.cuh
  void* partials;      // of acc: [field][part][channel]; on chip messages: see exchange.cuh
  void* coefficients;  // of acc: [kCoefficients][channel]
};

// Teams take turns with two places for their messages: who writes to one again has waited for all
// at the other, and so for those who read it.
constexpr int kTurns = 2;
// Numbers that a block tells its team about a channel: count, reference, mean and squared
// deviations, or two sums.
constexpr int kMessageNumbers = 4;

}  // namespace fastbn::cuda
