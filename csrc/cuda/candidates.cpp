// SPDX-License-Identifier: BSD-3-Clause
#include "candidates.h"

#include <algorithm>

#include "cost.h"
#include "mapping.h"

namespace fastbn::cuda {

namespace {

constexpr int kWarp = 32;

// The most values per statistic that the last block of a slab has to merge: about a microsecond.
constexpr int64_t kMostMerged = 8448;

// Waves of blocks to consider when slabs are cut up to fill the last one.
constexpr int kMostWaves = 8;
// How much fuller waves must get for slabs to be cut up more.
constexpr double kWorthCutting = 0.05;

// What is worth a launch less: everything waits for the slowest block.
constexpr int64_t kTinyBytes = 2 << 20;

// At least so much of a part resides, or there is no point in it.
constexpr double kLeastHeld = 0.1;
// Teams of a grid to consider.
constexpr int kMostTeams = 16;

int64_t tensor_bytes(const Problem& problem) {
  return problem.per_channel() * problem.channels * element_size(problem.dtype);
}

int accumulate_bytes(const Problem& problem) {
  return static_cast<int>(element_size(accumulate_dtype(problem.dtype)));
}

// Threads for items of a slab that a block has; each channel has one to finish it.
int count_threads(const Geometry& geometry, int64_t part_items, int most) {
  int64_t threads = part_items;
  if (geometry.mapping == Mapping::kColumns) {
    threads = std::min<int64_t>(part_items, most / geometry.vectors) * geometry.vectors;
  }
  threads = std::max<int64_t>(threads, geometry.slab_channels);
  return static_cast<int>(std::min<int64_t>(round_up(threads, kWarp), most));
}

// --- Shared memory -------------------------------------------------------------------------------

// Values that merging `rows` of `columns` keeps; see reduce.cuh.
int tree_values(int rows, int columns) {
  if (kWarp % columns == 0) rows = static_cast<int>(ceil_divide(rows, kWarp / columns));
  return (std::max(rows, 1) - 1) * columns;
}

// Numbers of room to merge what threads and columns of a block, and then parts, have gathered:
// `part_numbers` of each channel of a part. The last slab may have fewer channels than the others,
// which takes more room where warps do not consist of whole rows of them.
int scratch_numbers(const Problem& problem, const Geometry& geometry, int threads,
                    int part_numbers) {
  const int lanes = geometry.mapping == Mapping::kColumns ? geometry.width : 1;
  const int by_threads =
      tree_values(threads / geometry.vectors, geometry.vectors) * gathered_numbers(lanes);
  const auto by_lists = [&](int length, int lists, int numbers) {
    return tree_values(std::min(threads / lists, length), lists) * numbers;
  };
  const int by_columns = geometry.vectors * lanes * gathered_numbers(1) +
                         by_lists(geometry.repeats, geometry.slab_channels, gathered_numbers(1));
  int most = std::max(by_threads, by_columns);
  if (geometry.parts > 1) {
    const int64_t before_last = int64_t{geometry.slabs - 1} * geometry.slab_channels;
    const int last = static_cast<int>(problem.channels - before_last);
    most = std::max({most, by_lists(geometry.parts, geometry.slab_channels, part_numbers),
                     by_lists(geometry.parts, last, part_numbers)});
  }
  return most;
}

// --- Split, tiny, elementwise --------------------------------------------------------------------

class PassPlanner {
 public:
  PassPlanner(const Request& request, const Device& device, Algorithm algorithm)
      : request_(request), problem_(request.problem), device_(device) {
    plan_.algorithm = algorithm;
  }

  Plan plan() {
    map();
    cut_into_parts();
    Geometry& g = plan_.geometry;
    plan_.block = count_threads(g, ceil_divide(g.items, g.parts), kMaxThreads);
    plan_.grid = int64_t{g.slabs} * g.parts;
    plan_.vector_bytes = static_cast<int>(g.width * element_size(problem_.dtype));
    int numbers = kCoefficients * g.slab_channels;
    if (plan_.algorithm != Algorithm::kElementwise) {
      numbers += scratch_numbers(problem_, g, plan_.block, gathered_numbers(1));
    }
    plan_.shared_bytes = numbers * accumulate_bytes(problem_);
    count_traffic();
    count_workspace();
    return plan_;
  }

 private:
  // Slabs as wide as merging their parts allows, and as narrow as possible where there is one part.
  void map() {
    if (plan_.algorithm == Algorithm::kTiny) {
      plan_.geometry = map_elements(request_, kNarrowest);
      return;
    }
    for (int narrowed = 0; narrowed <= kNarrowest; ++narrowed) {
      plan_.geometry = map_elements(request_, narrowed);
      const int64_t parts = std::max(1, device_.multiprocessors / plan_.geometry.slabs);
      if (parts * plan_.geometry.slab_channels <= kMostMerged) break;
    }
  }

  void cut_into_parts() {
    Geometry& g = plan_.geometry;
    if (plan_.algorithm == Algorithm::kTiny) return;
    // A block is worth one round of loads, and slabs in parts need a counter each.
    const Occupancy compiled = occupancy(g.mapping);
    const int64_t round = bytes_in_flight(compiled) / compiled.blocks;
    const int64_t most_parts =
        g.slabs > kCounters ? 1 : std::clamp<int64_t>(slab_bytes(problem_, g) / round, 1, g.items);
    g.parts = static_cast<int>(parts_that_fill_waves(slots(device_, g.mapping), most_parts));
  }

  // The fewest parts that leave few slots of the last wave empty.
  int64_t parts_that_fill_waves(int64_t slots, int64_t most_parts) const {
    const int64_t slabs = plan_.geometry.slabs;
    int64_t best = 1;
    double best_filled = 0;
    for (int64_t waves = 1; waves <= kMostWaves; ++waves) {
      const int64_t parts = std::clamp<int64_t>(waves * slots / slabs, 1, most_parts);
      const int64_t blocks = slabs * parts;
      const double filled =
          static_cast<double>(blocks) / static_cast<double>(round_up(blocks, slots));
      if (waves > 1 && filled <= best_filled + kWorthCutting) continue;
      best = parts;
      best_filled = filled;
    }
    return best;
  }

  void count_traffic() {
    const int64_t pass = tensor_bytes(problem_);
    int reads = 1, writes = 1, floor = 2;
    switch (request_.operation) {
      case Operation::kForward:
        reads = 2;
        break;
      case Operation::kInference:
        break;
      case Operation::kBackward:
        writes = request_.want_dx;
        reads = plan_.algorithm == Algorithm::kElementwise ? writes
                : request_.training && request_.want_dx    ? 4
                                                           : 2;
        floor = std::min(reads, 2) + writes;
        break;
    }
    plan_.bytes_read = reads * pass;
    plan_.bytes_written = writes * pass;
    plan_.floor_bytes = floor * pass;
    const bool applies_after = plan_.algorithm == Algorithm::kSplit && writes == 1 &&
                               (request_.operation == Operation::kForward || request_.training);
    plan_.launches = reads == 0 ? 0 : applies_after ? 2 : 1;
    plan_.overlap_launches = plan_.launches == 2 && device_.major >= 9;
  }

  void count_workspace() {
    if (plan_.algorithm != Algorithm::kSplit) return;
    constexpr int64_t kAlignment = 256;
    const Geometry& g = plan_.geometry;
    const int64_t channel_bytes = problem_.channels * accumulate_bytes(problem_);
    const int64_t partials = g.parts > 1 ? gathered_numbers(1) * g.parts * channel_bytes : 0;
    plan_.partials_offset = round_up(kZeroedBytes, kAlignment);
    plan_.coefficients_offset = plan_.partials_offset + round_up(partials, kAlignment);
    plan_.workspace_bytes = plan_.coefficients_offset + kCoefficients * channel_bytes;
  }

  const Request& request_;
  const Problem& problem_;
  const Device& device_;
  Plan plan_;
};

// --- On chip -------------------------------------------------------------------------------------

class OnChipPlanner {
 public:
  OnChipPlanner(const Request& request, const Device& device, Algorithm algorithm)
      : request_(request),
        problem_(request.problem),
        device_(device),
        algorithm_(algorithm),
        tensors_(request.operation == Operation::kBackward ? 2 : 1) {}

  void for_each(const Consider& consider) const {
    if (request_.cumulative) return;
    int slabs = 0;
    for (int narrowed = 0; narrowed <= kNarrowest; ++narrowed) {
      const Geometry geometry = map_elements(request_, narrowed);
      if (!has_whole_vectors(problem_, geometry)) return;
      if (geometry.slabs == slabs) continue;
      slabs = geometry.slabs;
      for (const int together : {1, 2}) with_blocks(geometry, together, consider);
    }
  }

 private:
  // With so many blocks to a multiprocessor.
  void with_blocks(const Geometry& geometry, int together, const Consider& consider) const {
    switch (algorithm_) {
      case Algorithm::kResident:
        with_team(geometry, together, Team::kBlock, 1, together * device_.multiprocessors,
                  consider);
        break;
      case Algorithm::kCluster:
        for (size_t size = 1; size < kClusterSizes; ++size) {
          const auto& clusters = together == 1 ? device_.clusters : device_.half_clusters;
          with_team(geometry, together, Team::kCluster, 1 << size, clusters[size], consider);
        }
        break;
      default:
        if (device_.major < 9 || !device_.cooperative) return;
        for (int teams = 1; teams <= std::min(kMostTeams, geometry.slabs); ++teams) {
          with_team(geometry, together, Team::kGrid, together * device_.multiprocessors / teams,
                    teams, consider);
        }
    }
  }

  // In teams of so many blocks, of which so many run at once.
  void with_team(Geometry geometry, int together, Team team, int blocks, int64_t at_once,
                 const Consider& consider) const {
    if (blocks > geometry.items || at_once < 1 || (team != Team::kBlock && blocks < 2)) return;
    Plan plan;
    plan.algorithm = algorithm_;
    plan.blocks_per_multiprocessor = together;
    geometry.parts = blocks;
    Residence& residence = geometry.residence;
    residence.team = team;
    // As few teams as do the slabs in as many rounds: none idles long in the last one.
    const int64_t rounds = ceil_divide(geometry.slabs, at_once);
    residence.teams = static_cast<int>(ceil_divide(geometry.slabs, rounds));
    const int64_t part_items = ceil_divide(geometry.items, blocks);
    const int most = kMaxThreads * kOnChipBlocks / together;
    if (most < geometry.vectors || most < geometry.slab_channels) return;
    plan.block = count_threads(geometry, part_items, most);
    if (!fill_shared_memory(geometry, plan, part_items, rounds)) return;

    plan.geometry = geometry;
    plan.launches = 1;
    plan.grid = int64_t{residence.teams} * blocks;
    plan.cluster = team == Team::kCluster ? blocks : 1;
    plan.vector_bytes = kVectorBytes;
    count_traffic(plan);
    count_workspace(plan);
    consider(plan);
  }

  // Places everything, and as much of a part as there is room for. False if that is little.
  bool fill_shared_memory(Geometry& geometry, Plan& plan, int64_t part_items,
                          int64_t rounds) const {
    constexpr int64_t kAlignment = 128;
    Residence& residence = geometry.residence;
    const int acc = accumulate_bytes(problem_);
    const int64_t room = std::min(
        device_.shared_per_block,
        device_.shared_per_multiprocessor / plan.blocks_per_multiprocessor - kReservedShared);
    const int64_t numbers = kCoefficients * geometry.slab_channels +
                            scratch_numbers(problem_, geometry, plan.block, kMessageNumbers);
    const bool in_cluster = residence.team == Team::kCluster;
    const int64_t messages =
        in_cluster ? kTurns * kMessageNumbers * int64_t{geometry.slab_channels} * acc : 0;
    residence.messages = static_cast<int>(round_up(numbers * acc, kVectorBytes));
    residence.barriers = static_cast<int>(round_up(residence.messages + messages, kVectorBytes));

    // Stages are a round of the block's threads, evenly many items each.
    const int64_t row = geometry.mapping == Mapping::kColumns ? item_bytes(problem_, geometry)
                                                              : int64_t{kVectorBytes};
    const int64_t round_items =
        std::max<int64_t>(1, plan.block * kHeldVectors / tensors_ * kVectorBytes / row);
    const int64_t stages = ceil_divide(part_items, round_items);
    const int64_t stage_items = ceil_divide(part_items, stages);
    const int64_t stage_bytes = stage_items * row;
    const int64_t slot_bytes = tensors_ * stage_bytes;
    const int64_t most_slots =
        (room - residence.barriers - kAlignment) / (slot_bytes + int64_t{sizeof(uint64_t)});
    const int64_t slots = std::min(most_slots, stages * rounds);
    const int64_t held = std::min(slots, stages);
    if (static_cast<double>(held) < kLeastHeld * static_cast<double>(stages) || held < 1) {
      return false;
    }
    residence.stage_items = static_cast<int>(stage_items);
    residence.stages = static_cast<int>(held);
    residence.slots = static_cast<int>(slots);
    residence.stage_bytes = static_cast<int>(stage_bytes);
    residence.in_bulk = device_.copy_engine && run_bytes(problem_, geometry) >= kLeastRun;
    residence.ring = static_cast<int>(
        round_up(residence.barriers + slots * int64_t{sizeof(uint64_t)}, kAlignment));
    plan.shared_bytes = static_cast<int>(residence.ring + slots * slot_bytes);
    return true;
  }

  void count_traffic(Plan& plan) const {
    const Residence& residence = plan.geometry.residence;
    const int64_t pass = tensor_bytes(problem_);
    // Every part holds as many items, but for those that have fewer.
    const int64_t per_part = int64_t{residence.stages} * residence.stage_items;
    const int64_t parts = plan.geometry.parts;
    const int64_t least = plan.geometry.items / parts;
    const int64_t larger = plan.geometry.items % parts;
    const int64_t held_items =
        larger * std::min(per_part, least + 1) + (parts - larger) * std::min(per_part, least);
    const int64_t item = pass / plan.geometry.items;  // over all slabs
    plan.bytes_read = tensors_ * (pass + (plan.geometry.items - held_items) * item);
    plan.bytes_written = pass;
    plan.floor_bytes = (tensors_ + 1) * pass;
  }

  void count_workspace(Plan& plan) const {
    if (plan.geometry.residence.team != Team::kGrid) return;
    constexpr int64_t kAlignment = 256;
    plan.partials_offset = round_up(kZeroedBytes, kAlignment);
    plan.coefficients_offset = plan.partials_offset;
    // A message from each block of a team and one back, in turns.
    const int64_t messages =
        int64_t{plan.geometry.residence.teams} * kTurns * (plan.geometry.parts + 1);
    plan.workspace_bytes = plan.partials_offset + messages * kMessageNumbers *
                                                      plan.geometry.slab_channels *
                                                      accumulate_bytes(problem_);
  }

  // Shorter runs would keep the copy engine busier than threads.
  static constexpr int64_t kLeastRun = 512;

  const Request& request_;
  const Problem& problem_;
  const Device& device_;
  const Algorithm algorithm_;
  const int64_t tensors_;  // that are read
};

}  // namespace

void for_each_candidate(const Request& request, const Device& device, Algorithm algorithm,
                        const Consider& consider) {
  if (on_chip(algorithm)) {
    OnChipPlanner(request, device, algorithm).for_each(consider);
    return;
  }
  if (algorithm == Algorithm::kTiny) {
    if (request.cumulative || tensor_bytes(request.problem) > kTinyBytes) return;
  }
  Plan plan = PassPlanner(request, device, algorithm).plan();
  consider(plan);
}

std::string why_not(const Request& request, const Device& device, Algorithm algorithm) {
  if (request.cumulative) {
    return "momentum=None takes two launches, as blocks of one cannot tell whether another has "
           "counted the batch";
  }
  if (algorithm == Algorithm::kTiny) {
    return "it is for tensors of up to " + std::to_string(kTinyBytes) +
           " bytes, and this one has " + std::to_string(tensor_bytes(request.problem));
  }
  if (!has_whole_vectors(request.problem, map_elements(request))) {
    return "only aligned activations of whole 16-byte vectors stay on chip";
  }
  if (algorithm == Algorithm::kCluster && device.clusters[1] == 0) {
    return device.name + " has no clusters";
  }
  if (algorithm == Algorithm::kGrid && device.major < 9) {
    return "it takes compute capability 9.0 or later, and " + device.name + " is of " +
           std::to_string(device.major) + "." + std::to_string(device.minor);
  }
  if (algorithm == Algorithm::kGrid && !device.cooperative) {
    return "it takes launches whose blocks all live at once, and " + device.name + " has none";
  }
  return "too little of a channel's elements finds room in the shared memory of the blocks that " +
         device.name + " can let work on it together";
}

}  // namespace fastbn::cuda
