// SPDX-License-Identifier: BSD-3-Clause
//
// How the elements of a problem map to threads: the part of planning that asks nothing of a
// device.
#pragma once

#include "request.h"
#include "types.h"

namespace fastbn::cuda {

constexpr int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t multiple) {
  return ceil_divide(a, multiple) * multiple;
}

// The mapping and its channel tiles, in one split each. Where there is a choice, channel tiles are
// as wide as ever useful, and half as wide for each time that they are narrowed.
Geometry map_elements(const Request& request, int narrowing = 0);
// Narrowing channel tiles more often makes no difference.
constexpr int kMaxNarrowing = 3;

// How the threads of a geometry go on, when their number is known.
ThreadStep thread_step(const Geometry& geometry);

// The share of an SM that the kernels of a mapping are compiled for.
Occupancy occupancy(Mapping mapping);

// Bytes of one activation in a row of a channel tile (a vector or an element, where those are what
// the extent counts), and in a channel tile.
int64_t row_bytes(const Problem& problem, const Geometry& geometry);
int64_t channel_tile_bytes(const Problem& problem, const Geometry& geometry);

// Bytes that lie one after another in a channel tile.
int64_t contiguous_bytes(const Problem& problem, const Geometry& geometry);

// Whether all elements are in whole, aligned vectors.
bool has_whole_vectors(const Problem& problem, const Geometry& geometry);

}  // namespace fastbn::cuda
