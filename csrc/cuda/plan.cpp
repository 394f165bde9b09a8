// SPDX-License-Identifier: BSD-3-Clause
#include "plan.h"

#include <algorithm>
#include <optional>
#include <stdexcept>

#include "candidates.h"
#include "cost.h"

namespace fastbn::cuda {

namespace {

constexpr Algorithm kWithChoice[] = {Algorithm::kSplit, Algorithm::kTiny, Algorithm::kResident,
                                     Algorithm::kCluster, Algorithm::kGrid};

// Channels are counted in 32 bits.
constexpr int64_t kMostChannels = (int64_t{1} << 31) - 1;

// Whether the operation gathers and then applies, so that there is a choice of how.
bool has_two_steps(const Request& request) {
  if (request.operation == Operation::kForward) return true;
  return request.operation == Operation::kBackward && request.training && request.want_dx;
}

bool needs_no_sums(const Request& request) {
  if (request.operation == Operation::kInference) return true;
  return request.operation == Operation::kBackward && !request.want_sums &&
         !(request.training && request.want_dx);
}

// The fastest of an algorithm's plans; none if none fits. The first of equals.
std::optional<Plan> best(const Request& request, const Device& device, Algorithm algorithm) {
  std::optional<Plan> best;
  for_each_candidate(request, device, algorithm, [&](Plan& candidate) {
    candidate.seconds = predict_seconds(request, device, candidate);
    if (!best || candidate.seconds < best->seconds) best = candidate;
  });
  return best;
}

// Null for "auto".
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
  if (request.problem.channels > kMostChannels) {
    throw std::invalid_argument("batch norm on a GPU supports up to " +
                                std::to_string(kMostChannels) + " channels, but got " +
                                std::to_string(request.problem.channels));
  }
  if (needs_no_sums(request)) return {*best(request, device, Algorithm::kElementwise)};
  if (!has_two_steps(request)) return {*best(request, device, Algorithm::kSplit)};
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
  if (only == nullptr || !has_two_steps(request)) return *fastest;
  for (const Plan& plan : plans) {
    if (plan.algorithm == *only) return plan;
  }
  throw std::invalid_argument("algorithm '" + forced + "' does not fit: " +
                              why_not(request, device, *only) + "; choose auto or split");
}

const char* name(Algorithm algorithm) {
  switch (algorithm) {
    case Algorithm::kElementwise:
      return "elementwise";
    case Algorithm::kSplit:
      return "split";
    case Algorithm::kTiny:
      return "tiny";
    case Algorithm::kResident:
      return "resident";
    case Algorithm::kCluster:
      return "cluster";
    case Algorithm::kGrid:
      return "grid";
  }
  return "";
}

const char* name(Mapping mapping) {
  switch (mapping) {
    case Mapping::kColumns:
      return "columns";
    case Mapping::kSegments:
      return "segments";
    case Mapping::kStrided:
      return "strided";
  }
  return "";
}

std::string describe(const Problem& problem, const Plan& plan) {
  constexpr const char* kDtypes[] = {"float64", "float32", "bfloat16", "float16"};
  constexpr const char* kLayouts[] = {"ncs", "nsc", "strided"};
  const auto number = [](int64_t value) { return std::to_string(value); };
  return "N=" + number(problem.batch) + ", C=" + number(problem.channels) +
         ", S=" + number(problem.spatial) + " " + kDtypes[static_cast<int>(problem.dtype)] + " " +
         kLayouts[static_cast<int>(problem.layout)] + " (plan: " + name(plan.algorithm) + " over " +
         name(plan.geometry.mapping) + ", " + number(plan.grid) + " blocks of " +
         number(plan.block) + " threads in clusters of " + number(plan.cluster) + ", " +
         number(plan.shared_bytes) + " bytes of shared memory)";
}

}  // namespace fastbn::cuda
