// SPDX-License-Identifier: BSD-3-Clause
//
// Which algorithm, grid and shared memory for a problem on a device. A pure function of its
// arguments, on the host: it can be asked about GPUs that are not there.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "../problem.h"
#include "geometry.h"

namespace fastbn::cuda {

constexpr int kClusterSizes = 5;

// Shared memory of a multiprocessor that the system takes for each block.
constexpr int64_t kReservedShared = 1024;

// What the planner wants to know of a GPU.
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
  // See query_residence() for the following. Bulk copies to shared memory;
  bool copy_engine = false;
  // launches whose blocks all live at once;
  bool cooperative = false;
  // clusters of 1, 2, 4, 8 and 16 blocks that run at once, with a multiprocessor to each block or
  // half of one: clusters do not cross the borders of a device's parts, which need not be of a
  // size.
  std::array<int, kClusterSizes> clusters = {};
  std::array<int, kClusterSizes> half_clusters = {};
};

// Devices by their published properties.
const std::vector<Device>& known_devices();

enum class Operation : int8_t { kForward, kInference, kBackward };

struct Request {
  Operation operation = Operation::kForward;
  Problem problem;
  bool aligned = true;  // all activations begin at multiples of kVectorBytes
  // Forward: momentum is 1 / num_batches_tracked.
  bool cumulative = false;
  // Backward.
  bool training = true;
  bool want_dx = true;
  bool want_sums = true;  // dweight or dbias
};

enum class Algorithm : int8_t {
  kElementwise,  // apply given statistics: one kernel
  kSplit,        // gather sums, then apply them: two kernels, or only the first
  kTiny,         // each block gathers and applies on its own: one kernel
  // Tensors stay in shared memory in between: one kernel.
  kResident,  // of a block
  kCluster,   // of a cluster
  kGrid,      // of blocks all over the device
};

constexpr bool on_chip(Algorithm algorithm) { return algorithm >= Algorithm::kResident; }

struct Plan {
  Algorithm algorithm = Algorithm::kSplit;
  Geometry geometry;
  int launches = 0;
  int64_t grid = 0;  // blocks of each launch
  int block = 0;     // threads
  int cluster = 1;   // blocks
  int shared_bytes = 0;
  int vector_bytes = 0;
  bool overlap_launches = false;      // by programmatic dependent launch
  int blocks_per_multiprocessor = 0;  // on chip: that shared memory and registers have room for
  // Of activations, over all launches, from a cache or not; values per channel are not counted.
  int64_t bytes_read = 0;
  int64_t bytes_written = 0;
  int64_t floor_bytes = 0;  // if each input were read once and each output written once
  double seconds = 0;       // predicted; see cost.cpp
  // The workspace: counters and barriers (to be zero), partial results, coefficients.
  int64_t partials_offset = 0;
  int64_t coefficients_offset = 0;
  int64_t workspace_bytes = 0;
};

// At the start of a workspace: counters, then as many barriers.
constexpr int kCounters = 4096;
constexpr int64_t kZeroedBytes = 2 * kCounters * sizeof(unsigned);

// The plan that is predicted to take the least time. `forced` names an algorithm to use whatever
// the cost, where there is a choice: "auto", "split", "tiny", "resident", "cluster" or "grid".
// Throws std::invalid_argument if it is none of them or does not fit. The problem has elements.
Plan plan(const Request& request, const Device& device, const std::string& forced = "auto");

// What was chosen from: the best plan of each algorithm that fits.
std::vector<Plan> alternatives(const Request& request, const Device& device);

const char* name(Algorithm algorithm);
const char* name(Mapping mapping);

// One line for messages: the problem's shape and what was planned for it.
std::string describe(const Problem& problem, const Plan& plan);

}  // namespace fastbn::cuda
