// SPDX-License-Identifier: BSD-3-Clause
//
// Which algorithm, grid and shared memory for a problem on a device. A pure function of its
// arguments, on the host: it can be asked about GPUs that are not there.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "../problem.h"
#include "geometry.h"

namespace fastbn::cuda {

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
};

struct Plan {
  Algorithm algorithm = Algorithm::kSplit;
  Geometry geometry;
  int launches = 0;
  int64_t grid = 0;  // blocks of each launch
  int block = 0;     // threads
  int cluster = 1;   // blocks
  int shared_bytes = 0;
  int vector_bytes = 0;
  bool overlap_launches = false;  // by programmatic dependent launch
  // Of activations, over all launches; values per channel are not counted.
  int64_t bytes_read = 0;
  int64_t bytes_written = 0;
  int64_t floor_bytes = 0;  // if each input were read once and each output written once
  // The workspace: counters (to be zero), partial results, coefficients.
  int64_t partials_offset = 0;
  int64_t coefficients_offset = 0;
  int64_t workspace_bytes = 0;
};

// Counters at the start of a workspace.
constexpr int kCounters = 4096;

// `forced` is the name of an algorithm to use whatever the cost, where there is a choice: "auto",
// "split" or "tiny". Throws std::invalid_argument if it is none of them or does not fit. The
// problem has elements.
Plan plan(const Request& request, const Device& device, const std::string& forced = "auto");

const char* name(Algorithm algorithm);
const char* name(Mapping mapping);

// One line for messages: the problem's shape and what was planned for it.
std::string describe(const Problem& problem, const Plan& plan);

}  // namespace fastbn::cuda
