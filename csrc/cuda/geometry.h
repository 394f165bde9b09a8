// SPDX-License-Identifier: BSD-3-Clause
//
// How blocks and threads share out an activation: the part of a plan that kernels read. Plain
// numbers, filled by the planner.
//
// A channel tile is what one block can keep statistics of: some channels, whole. All splits of a
// channel tile hold the same channels and different elements; a block does one split of one channel
// tile. In persistent kernels, the blocks that do the splits of a channel tile are a CTA group, and
// one group does several channel tiles, one after another.
//
// Example: x of shape (32, 64, 56, 56), bfloat16, channels last, two passes on an H200 (132 SMs).
//
//   matrix     100,352 rows (N*S, the extent) by 64 columns (C)
//   vector     8 columns, of 16 bytes; a row has 8 vectors
//   tiles      1 channel tile, of all 64 channels
//   splits     132, one per SM: block b has rows [760.2 b, 760.2 (b + 1)), rounded down
//   block      512 threads: 64 rows of 8 vectors; a thread takes every 64th row of its split, 11 or
//              12 of them, 8 at once
//
// Contiguous, the same x is 64 channel tiles of one channel, each with an extent of 32 * 392 =
// 12,544 vectors that lie in 32 segments, one per sample.
#pragma once

#include <cstdint>

#include "../core/finalize.h"

namespace fastbn::cuda {

constexpr int kVectorBytes = 16;

// Threads of a warp, on every GPU so far. The planner counts with it what kernels do with it.
constexpr int kWarpThreads = 32;

// The most threads of a block.
constexpr int kMaxThreads = 512;

// How much of an SM a mapping's kernels are compiled for: blocks that fit its registers at once,
// and vectors that a thread has in flight, over all tensors it reads.
//
// An H200 needs about 32 KiB in flight per SM to keep its memory busy (4.8 TB/s times 0.9 us of
// latency under load, over 132 SMs). Mappings of vectors have twice that, so that an SM half filled
// still has enough:
//
//   matrix columns   1 block  * 512 threads * 8 vectors * 16 bytes = 64 KiB; statistics of 8
//                    channels take most of the 128 registers of a thread
//   contiguous       2 blocks * 512 threads * 4 vectors * 16 bytes = 64 KiB
struct Occupancy {
  int blocks;
  int loads;
};
constexpr Occupancy kMatrixColumnsOccupancy{1, 8};
constexpr Occupancy kContiguousOccupancy{2, 4};
// Strides take registers, and an element is no vector: no promise.
constexpr Occupancy kGenericOccupancy{1, 1};

// Persistent kernels have all registers for one full block; smaller blocks share them.
constexpr int kPersistentBlocks = 1;

constexpr int bytes_in_flight(Occupancy occupancy) {
  return occupancy.blocks * kMaxThreads * occupancy.loads * kVectorBytes;
}
static_assert(bytes_in_flight(kMatrixColumnsOccupancy) >= 2 * (32 << 10));
static_assert(bytes_in_flight(kContiguousOccupancy) >= 2 * (32 << 10));

// What is shared out among threads: layouts/ has a class for each.
enum class Mapping : int8_t {
  // The activation is a matrix whose columns each belong to one channel, and a thread has a vector
  // of adjacent columns: channels last, and contiguous channels too small for whole vectors.
  kMatrixColumns,
  // A channel tile is one channel, a segment of adjacent elements in each sample, and a thread has
  // vectors of its elements: contiguous.
  kContiguous,
  // Like kContiguous, one element at a time at any strides.
  kGeneric,
};

// Divides by a number that is known before the launch, by one multiplication (Granlund and
// Montgomery, "Division by invariant integers using multiplication", 1994).
struct FastDivmod {
  uint32_t divisor = 1;
  uint32_t multiplier = 1;
  int32_t shift = 0;
};

// How the blocks of a CTA group reduce among each other.
enum class CtaGroup : int8_t {
  kBlock,    // the group is one block
  kCluster,  // the group is a thread-block cluster, whose blocks see each other's shared memory
  kGrid,     // by global memory; all groups of the launch live at once
};

// How tiles get to shared memory, and results from there.
enum class TileCopies : int8_t {
  kVectors,  // vector by vector, by the threads that take them
  kSpans,    // by the copy engine, span by span of adjacent elements
  kBoxes,    // by the copy engine, as boxes of the matrix, whose rows are short and far apart
};

// What a block keeps in shared memory between reducing and applying: the first rows of its split,
// in tiles of equally many or one fewer. Tiles pass through a pipeline of stages: one is copied to
// a stage, stays there until it has been applied, and makes way for a tile of the next channel
// tile. Rows beyond the last tile are read twice.
//
// Where the copy engine moves tiles, the block's last warp is a producer: it takes no elements, and
// has the engine fill stages and store what the other threads, the consumers, have left there. A
// box never reaches beyond its tile: what is stored by it is not another block's.
struct Persistence {
  CtaGroup cta_group = CtaGroup::kBlock;
  int32_t cta_groups = 0;   // block = group * splits + split; channel tiles go round the groups
  int32_t tile_extent = 0;  // rows or vectors of a tile, the last ones of a split have one fewer
  int32_t tiles = 0;        // of a split
  int32_t stages = 0;       // as many as tiles, or more
  TileCopies copies = TileCopies::kVectors;
  int32_t box_rows = 0;         // kBoxes: that every tile has; some have one more
  int32_t partials_offset = 0;  // where things lie in shared memory, in bytes: a cluster's partial
                                // results, with a barrier for each phase in front,
  int32_t barriers_offset = 0;  // barriers of each stage,
  int32_t stages_offset = 0;    // and the stages,
  int32_t tile_bytes = 0;       // of one tensor each; a stage has one of each tensor
};

// From a thread's vector to its next one.
struct ThreadStep {
  int32_t rows = 1;     // kMatrixColumns: of threads in a block, which is as many rows further
  int32_t vectors = 0;  // kContiguous: as many vectors further in a segment,
  int32_t samples = 0;  // so many samples further
};

// Vectors are numbered over the activation in 32 bits.
struct Geometry {
  Mapping mapping = Mapping::kMatrixColumns;
  int32_t width = 1;  // elements of a vector
  int32_t channel_tiles = 0;
  int32_t splits = 0;         // of a channel tile; without persistence
                              // block = split * channel_tiles + channel_tile
  int32_t tile_channels = 1;  // of a channel tile; the last one may have fewer
  int32_t threads = 0;        // of a block that take elements
  // What the splits of a channel tile share: rows of the matrix, vectors or elements of the
  // channel.
  int64_t extent = 0;

  // kMatrixColumns: column = channel * channel_step + repeat * repeat_step, counted within the
  // channel tile.
  int64_t row_vectors = 0;  // of a row of the matrix
  int32_t vectors = 1;      // of a row of a channel tile
  int32_t repeats = 1;      // columns of a channel
  int32_t channel_step = 1;
  int32_t repeat_step = 0;

  // kContiguous: vectors that cover a segment; they are aligned and may reach past either end.
  FastDivmod segment_vectors;

  ThreadStep thread_step;
  Persistence persistence;
};

// A stage has a barrier for the arrival of its tile, and one for its release.
constexpr int kStageBarriers = 2;
constexpr int kBarrierBytes = 8;

// Vectors that a thread takes from shared memory at once, over all tensors it reads: enough for
// the warps of a block to hide the latency, and tiles of no more are small.
constexpr int kSmemVectors = 2;

// What follows batch norm, as far as kernels are compiled for it: nothing; an activation function,
// whichever; or that of the sum with a residual. In backward kResidual means that the residual is
// read, which only derivatives that depend on it need, and kMask that a mask tells derivatives.
enum class EpilogueKind : int8_t { kNone, kActivation, kResidual, kMask };

// Whether kernels compute the pre-activation, for which backward takes the shift of forward.
FASTBN_HOST_DEVICE constexpr bool computes_z(EpilogueKind kind) {
  return kind == EpilogueKind::kActivation || kind == EpilogueKind::kResidual;
}

// Vectors of each of several tensors, if a thread takes so many of all of them at once.
FASTBN_HOST_DEVICE constexpr int vectors_of_each(int vectors, int tensors) {
  return vectors > tensors ? vectors / tensors : 1;
}

// A block's shared memory begins with kCoefficients of each of its channels and, where backward
// computes the pre-activation, with one number more, the shift of forward; then comes scratch to
// merge what threads, columns and splits have reduced.
constexpr int kShiftPlace = kCoefficients;
FASTBN_HOST_DEVICE constexpr int record_numbers(bool has_shift) {
  return kCoefficients + has_shift;
}

// Numbers that statistics of `lanes` channels consist of: a count, means and squared deviations.
constexpr int statistics_numbers(int lanes) { return 1 + 2 * lanes; }

// Values that merging `rows` rows of `columns` columns, a thread each, needs scratch for: warps of
// whole rows merge theirs by shuffles, and of what is left all but the first row is stored. See
// reduce_rows() of primitives/block_reduce.cuh.
constexpr int reduce_rows_scratch(int rows, int columns) {
  if (kWarpThreads % columns == 0) {
    const int rows_per_warp = kWarpThreads / columns;
    rows = (rows + rows_per_warp - 1) / rows_per_warp;
  }
  return ((rows > 1 ? rows : 1) - 1) * columns;
}

// Values that merging `lists` lists of `length` values by a block of `threads` threads needs
// scratch for. See reduce_lists().
constexpr int reduce_lists_scratch(int threads, int length, int lists) {
  const int threads_per_list = threads / lists;
  return reduce_rows_scratch(threads_per_list < length ? threads_per_list : length, lists);
}

// The most channel tiles that are cut into splits, and the most CTA groups of a grid.
constexpr int kCountedTiles = 4096;
constexpr int kMaxCtaGroups = 16;

// By which blocks learn what others have done. Zero at first, and after each launch but for top
// bits of barriers, which may be either way.
struct alignas(256) Counters {
  unsigned tiles[kCountedTiles];     // splits of a channel tile that are done
  unsigned barriers[kMaxCtaGroups];  // see GridBarrier in primitives/group_reduce.cuh
};

// What blocks and kernels of a call pass on: counters, which are those of its stream, per-channel
// results of the splits, and what the first kernel leaves to the second.
struct Workspace {
  Counters* counters = nullptr;
  void* partials = nullptr;      // of acc_t: [field][split][channel]; persistent: see GroupPartials
  void* coefficients = nullptr;  // of acc_t: [kCoefficients][channel]
};

// Partial results of a CTA group are double buffered: a buffer is written again only after a
// barrier on the other one, which all readers of the first have passed.
constexpr int kPhases = 2;
// Numbers that a block passes to its CTA group about a channel: count, pivot, mean and squared
// deviations, or two sums.
constexpr int kMomentsNumbers = 4;
constexpr int kGradSumsNumbers = 2;

}  // namespace fastbn::cuda
