// SPDX-License-Identifier: BSD-3-Clause
#include "plan.h"

#include <algorithm>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "candidates.h"
#include "cost.h"

namespace fastbn::cuda {

namespace {

// The grid is the last, to be compared with all others.
constexpr Algorithm kWithChoice[] = {Algorithm::kTwoPass, Algorithm::kOneBlock,
                                     Algorithm::kPersistentBlock, Algorithm::kPersistentCluster,
                                     Algorithm::kPersistentGrid};

// Channels are counted in 32 bits.
constexpr int64_t kMaxChannels = (int64_t{1} << 31) - 1;

// Predicted times within so much of each other are equal: the model has not been fitted to a
// device.
constexpr double kEqual = 1.15;
// How much faster than other persistent plans a grid must be: it occupies the whole device, and its
// barriers are what the model knows least of.
constexpr double kGridGain = 1.25;

std::vector<Plan> candidates(const Request& request, const Device& device, Algorithm algorithm) {
  std::vector<Plan> plans;
  for_each_candidate(request, device, algorithm, [&](Plan& candidate) {
    candidate.seconds = predict_seconds(request, device, candidate);
    plans.push_back(candidate);
  });
  return plans;
}

// Whether the first of two plans that take equal times is better: it moves fewer bytes, which are
// exact; else it has two blocks to a multiprocessor, of which one works while the other waits; else
// it is a cluster.
bool is_better(const Plan& a, const Plan& b) {
  const auto rank = [](const Plan& plan) {
    return std::make_tuple(plan.bytes_read + plan.bytes_written, -plan.blocks_per_multiprocessor,
                           plan.algorithm != Algorithm::kPersistentCluster, plan.seconds);
  };
  return rank(a) < rank(b);
}

// The best of the plans that take the least time. There must be one.
const Plan& best(const std::vector<Plan>& plans) {
  const Plan* best =
      &*std::min_element(plans.begin(), plans.end(),
                         [](const Plan& a, const Plan& b) { return a.seconds < b.seconds; });
  const double equal = kEqual * best->seconds;
  for (const Plan& plan : plans) {
    if (plan.seconds <= equal && is_better(plan, *best)) best = &plan;
  }
  return *best;
}

// Whether a grid is worth more than all plans of other algorithms. Those that are not persistent
// move more bytes, so that it may take an equal time.
bool is_worth(const Plan& grid, const std::vector<Plan>& others) {
  return std::all_of(others.begin(), others.end(), [&](const Plan& other) {
    return is_persistent(other.algorithm) ? kGridGain * grid.seconds <= other.seconds
                                          : grid.seconds <= kEqual * other.seconds;
  });
}

// The best grid that is worth more than others; the best one if none is.
const Plan& best_grid(std::vector<Plan>& grids, const std::vector<Plan>& others) {
  const auto rest = std::stable_partition(grids.begin(), grids.end(),
                                          [&](const Plan& grid) { return is_worth(grid, others); });
  if (rest != grids.begin()) grids.erase(rest, grids.end());
  return best(grids);
}

// The algorithm by its name; null for "auto".
const Algorithm* find_forced(const std::string& forced) {
  if (forced == "auto") return nullptr;
  std::string known = "auto";
  for (const Algorithm& algorithm : kWithChoice) {
    if (forced == name(algorithm)) return &algorithm;
    known += std::string(", ") + name(algorithm);
  }
  throw std::invalid_argument("there is no algorithm '" + forced + "'; choose one of " + known);
}

}  // namespace

std::vector<Plan> alternatives(const Request& request, const Device& device) {
  if (request.problem.channels > kMaxChannels) {
    throw std::invalid_argument("batch norm on a GPU supports up to " +
                                std::to_string(kMaxChannels) + " channels, but got " +
                                std::to_string(request.problem.channels));
  }
  if (tensor_bytes(request.problem) == 0 && request.problem.layout != Layout::kGeneric) {
    throw std::invalid_argument("a problem without elements has no layout but generic");
  }
  const Traffic traffic = traffic_of(request);
  if (traffic.reduce_reads == 0) return candidates(request, device, Algorithm::kElementwise);
  if (traffic.apply_reads == 0) return candidates(request, device, Algorithm::kTwoPass);
  std::vector<Plan> plans;
  for (const Algorithm algorithm : kWithChoice) {
    std::vector<Plan> all = candidates(request, device, algorithm);
    if (all.empty()) continue;
    const bool is_grid = algorithm == Algorithm::kPersistentGrid;
    plans.push_back(is_grid ? best_grid(all, plans) : best(all));
  }
  return plans;
}

Plan plan(const Request& request, const Device& device, const std::string& forced) {
  const Algorithm* only = find_forced(forced);
  std::vector<Plan> plans = alternatives(request, device);
  if (only == nullptr || !traffic_of(request).has_both_passes()) {
    const Plan last = plans.back();
    if (last.algorithm != Algorithm::kPersistentGrid) return best(plans);
    plans.pop_back();
    return is_worth(last, plans) ? last : best(plans);
  }
  for (const Plan& plan : plans) {
    if (plan.algorithm == *only) return plan;
  }
  throw std::invalid_argument("algorithm '" + forced + "' does not fit: " +
                              why_not(request, device, *only) + "; choose auto or two_pass");
}

const char* name(Algorithm algorithm) {
  switch (algorithm) {
    case Algorithm::kElementwise:
      return "elementwise";
    case Algorithm::kTwoPass:
      return "two_pass";
    case Algorithm::kOneBlock:
      return "one_block";
    case Algorithm::kPersistentBlock:
      return "persistent_block";
    case Algorithm::kPersistentCluster:
      return "persistent_cluster";
    case Algorithm::kPersistentGrid:
      return "persistent_grid";
  }
  return "";
}

const char* name(Mapping mapping) {
  switch (mapping) {
    case Mapping::kMatrixColumns:
      return "matrix_columns";
    case Mapping::kContiguous:
      return "contiguous";
    case Mapping::kGeneric:
      return "generic";
  }
  return "";
}

std::string current_name(const std::string& algorithm) {
  constexpr std::pair<const char*, Algorithm> kRenamed[] = {
      {"split", Algorithm::kTwoPass},
      {"tiny", Algorithm::kOneBlock},
      {"resident", Algorithm::kPersistentBlock},
      {"cluster", Algorithm::kPersistentCluster},
      {"grid", Algorithm::kPersistentGrid},
  };
  for (const auto& [old_name, renamed] : kRenamed) {
    if (algorithm == old_name) return name(renamed);
  }
  return algorithm;
}

std::string describe(const Problem& problem, const Plan& plan) {
  constexpr const char* kDtypes[] = {"float64", "float32", "bfloat16", "float16"};
  constexpr const char* kLayouts[] = {"contiguous", "channels_last", "generic"};
  const auto number = [](int64_t value) { return std::to_string(value); };
  return "N=" + number(problem.batch) + ", C=" + number(problem.channels) +
         ", S=" + number(problem.spatial) + " " + kDtypes[static_cast<int>(problem.dtype)] + " " +
         kLayouts[static_cast<int>(problem.layout)] + " (plan: " + name(plan.algorithm) + " over " +
         name(plan.geometry.mapping) + ", " + number(plan.grid) + " blocks of " +
         number(plan.block) + " threads in clusters of " + number(plan.cluster) + ", " +
         number(plan.shared_bytes) + " bytes of shared memory)";
}

}  // namespace fastbn::cuda
