// SPDX-License-Identifier: BSD-3-Clause
#include "plan.h"

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <utility>

#include "candidates.h"
#include "cost.h"

namespace fastbn::cuda {

namespace {

constexpr Algorithm kWithChoice[] = {Algorithm::kTwoPass, Algorithm::kOneBlock,
                                     Algorithm::kPersistentBlock, Algorithm::kPersistentCluster,
                                     Algorithm::kPersistentGrid};

// Channels are counted in 32 bits.
constexpr int64_t kMaxChannels = (int64_t{1} << 31) - 1;

// The fastest of an algorithm's plans; none if none fits. The first of equals.
std::optional<Plan> best(const Request& request, const Device& device, Algorithm algorithm) {
  std::optional<Plan> best;
  for_each_candidate(request, device, algorithm, [&](Plan& candidate) {
    candidate.seconds = predict_seconds(request, device, candidate);
    if (!best || candidate.seconds < best->seconds) best = candidate;
  });
  return best;
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
  if (traffic.reduce_reads == 0) return {*best(request, device, Algorithm::kElementwise)};
  if (traffic.apply_reads == 0) return {*best(request, device, Algorithm::kTwoPass)};
  std::vector<Plan> plans;
  for (const Algorithm algorithm : kWithChoice) {
    if (const auto plan = best(request, device, algorithm)) plans.push_back(*plan);
  }
  return plans;
}

Plan plan(const Request& request, const Device& device, const std::string& forced) {
  const Algorithm* only = find_forced(forced);
  const std::vector<Plan> plans = alternatives(request, device);
  const auto fastest =
      std::min_element(plans.begin(), plans.end(),
                       [](const Plan& a, const Plan& b) { return a.seconds < b.seconds; });
  if (only == nullptr || !traffic_of(request).has_both_passes()) return *fastest;
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
