// SPDX-License-Identifier: BSD-3-Clause
//
// How blocks and threads share out an activation: the part of a plan that kernels read. Plain
// numbers, filled by plan.cpp.
//
// A slab is what one block can keep statistics of: some channels, whole. All parts of a slab hold
// the same channels and different elements; a block does one part of one slab.
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

struct Geometry {
  Mapping mapping = Mapping::kColumns;
  int32_t width = 1;  // elements of a vector
  int32_t slabs = 0;  // block = part * slabs + slab
  int32_t parts = 0;
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
};

// Shared memory of a block: coefficients of its channels (kCoefficients numbers each), then room to
// merge what threads, columns and parts have gathered.
constexpr int kCoefficients = 4;

// Numbers that statistics of `lanes` channels consist of: a count, means and squared deviations.
constexpr int gathered_numbers(int lanes) { return 1 + 2 * lanes; }

// Per-channel results of the parts, and what the first kernel leaves to the second.
struct Workspace {
  unsigned* counters;  // one per slab, zero between launches
  void* partials;      // of acc: [field][part][channel]
  void* coefficients;  // of acc: [kCoefficients][channel]
};

}  // namespace fastbn::cuda
