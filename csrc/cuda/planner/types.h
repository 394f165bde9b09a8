// SPDX-License-Identifier: BSD-3-Clause
//
// The devices that the planner knows of, and the plans that it makes.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "../geometry.h"

namespace fastbn::cuda {

constexpr int kClusterSizes = 5;

// Shared memory of a multiprocessor that the system takes for each block.
constexpr int64_t kReservedShared = 1024;

// A GPU, as far as the planner wants to know it.
struct Device {
  std::string name;
  int major = 0;  // compute capability
  int minor = 0;
  int multiprocessors = 0;
  int threads_per_multiprocessor = 0;
  int64_t shared_per_block = 0;           // bytes that a block can have at most
  int64_t shared_per_multiprocessor = 0;  // bytes
  int64_t l2_bytes = 0;
  double bandwidth = 0;  // of the memory, bytes per second
  // The driver answers for the following; see query_persistence() of ../batch_norm.h.
  bool copy_engine = false;  // bulk copies to shared memory
  bool cooperative = false;  // launches whose blocks all live at once
  // Clusters of 1, 2, 4, 8 and 16 blocks that run at once, with a multiprocessor to each block or
  // half of one. A cluster does not cross the borders of a device's processing clusters, which need
  // not be of a size.
  std::array<int, kClusterSizes> clusters = {};
  std::array<int, kClusterSizes> half_clusters = {};

  bool is_hopper_or_later() const { return major >= 9; }
};

enum class Algorithm : int8_t {
  kElementwise,  // applies given coefficients: one kernel
  kTwoPass,      // reduces, then applies: two kernels, or only the first
  kOneBlock,     // each block reduces and applies on its own: one kernel
  // Tensors stay in shared memory between reducing and applying, in one kernel:
  kPersistentBlock,    // that of a block,
  kPersistentCluster,  // of a cluster,
  kPersistentGrid,     // or of blocks all over the device.
};

constexpr bool is_persistent(Algorithm algorithm) {
  return algorithm >= Algorithm::kPersistentBlock;
}

struct Plan {
  Algorithm algorithm = Algorithm::kTwoPass;
  EpilogueKind epilogue = EpilogueKind::kNone;
  Geometry geometry;
  int launches = 0;
  int64_t grid = 0;  // blocks of each launch
  int block = 0;     // threads
  int cluster = 1;   // blocks
  int shared_bytes = 0;
  int vector_bytes = 0;
  bool overlap_launches = false;      // by programmatic dependent launch
  int blocks_per_multiprocessor = 0;  // persistent: that shared memory and registers have room for
  // Bytes of activations over all launches, from a cache or not; values per channel are not
  // counted.
  int64_t bytes_read = 0;
  int64_t bytes_written = 0;
  int64_t floor_bytes = 0;  // if each input were read once and each output written once
  double seconds = 0;       // predicted; see cost.cpp
  bool needs_counters = false;
  // Partial results and, behind them, coefficients.
  int64_t coefficients_offset = 0;
  int64_t workspace_bytes = 0;
};

}  // namespace fastbn::cuda
