// SPDX-License-Identifier: BSD-3-Clause
//
// The three concepts that kernels are put together from.
//
// A Mapping (a class of layouts/) says which elements a thread has. It is constructed from a
// problem, a geometry, a channel tile and a split, and has
//   scalar_t, acc_t               the types of activations and of sums
//   kLanes                        channels that a thread keeps statistics of
//   kPersistent                   whether persistent kernels are compiled for it
//   kOccupancy                    how much of an SM its kernels are compiled for
//   split(), channel_tile()       what it was constructed with
//   first_channel(), channels()   the channels of the channel tile
//   rows(), row()                 rows of threads, and this thread's: rows hold the same columns
//   vectors(), vector()           threads of a row, and this thread's place in it
//   active()                      whether this thread has any columns
//   for_each_lane(take)           take(lane, channel) for its lanes, channels counted in the tile
//   first_offset(x, channel)      where the first element of a channel lies in an activation
//   for_each<kVectors, kReverse>(range, step)
//                                 step(thread_tile) for all its elements in a range, kVectors
//                                 vectors at a time, in order of memory or from the end
// and if it is kPersistent
//   first_in_row(channel)         where the first element of a channel lies in a tile
//   for_each_in_smem<kVectors, kInPlace>(range, smem, step)
//                                 the same of a tile in shared memory, where results take the
//                                 place of the first activation: kInPlace
//   bulk_spans(range), bulk_span(range, i), bulk_bytes(range)
//                                 the adjacent elements that a range consists of
//   kHasBoxes                     whether a tile may begin with a box of a matrix, and if so
//   box_column(), box_bytes()     its first column, and its bytes in a tile, 0 if it is not there
//
// A Step (a class of steps/) is called with thread tiles and does its part of batch norm on them:
// kTensors is the number of activations that it reads, kShares among how many a thread shares out
// the vectors that it can hold, and kWholeVectors whether it takes no others: so it is if it has a
// mask.
//
// A Value is what a thread has reduced: merge(other) takes another thread's into it, a default one
// changes nothing, and lane(i) is what it knows of one channel, a Value of type Lane.
#pragma once

#include "../primitives/channel_values.cuh"
#include "../primitives/thread_tile.cuh"
