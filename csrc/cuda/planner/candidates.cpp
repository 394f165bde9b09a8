// SPDX-License-Identifier: BSD-3-Clause
#include "candidates.h"

#include <algorithm>

#include "../../core/mask.h"
#include "cost.h"
#include "mapping.h"

namespace fastbn::cuda {

namespace {

// The most values per statistic that the last block of a channel tile has to merge, which takes it
// about a microsecond.
constexpr int64_t kMaxMerged = 8448;

// Waves of blocks to consider when channel tiles are cut up to fill the last one.
constexpr int kMaxWaves = 8;
// The share by which the last wave must get fuller for channel tiles to be cut into more splits.
constexpr double kWorthCutting = 0.05;

// The largest activation for which a launch less may be worth waiting for the slowest block.
constexpr int64_t kMaxOneBlockBytes = 2 << 20;

// The least share of a split that must fit shared memory for a persistent plan to be considered.
constexpr double kMinInSmem = 0.1;

int accumulate_bytes(const Problem& problem) {
  return static_cast<int>(element_size(accumulate_dtype(problem.dtype)));
}

// Threads of a block for the extent of its split; each channel has one to finalize it.
int count_threads(const Geometry& geometry, int64_t split_extent, int most) {
  int64_t threads = split_extent;
  if (geometry.mapping == Mapping::kMatrixColumns) {
    threads = std::min<int64_t>(split_extent, most / geometry.vectors) * geometry.vectors;
  }
  threads = std::max<int64_t>(threads, geometry.tile_channels);
  return static_cast<int>(std::min<int64_t>(round_up(threads, kWarpThreads), most));
}

// --- Shared memory -------------------------------------------------------------------------------

// Numbers of scratch to merge what threads and columns of a block, and then splits, have reduced:
// `split_numbers` of each channel of a split. The last channel tile may have fewer channels than
// the others, which takes more where warps do not consist of whole rows of them.
int scratch_numbers(const Problem& problem, const Geometry& geometry, int threads,
                    int split_numbers) {
  const int lanes = geometry.mapping == Mapping::kMatrixColumns ? geometry.width : 1;
  const int by_threads =
      reduce_rows_scratch(threads / geometry.vectors, geometry.vectors) * statistics_numbers(lanes);
  const int by_columns = statistics_numbers(1) *
                         (geometry.vectors * lanes +
                          reduce_lists_scratch(threads, geometry.repeats, geometry.tile_channels));
  int most = std::max(by_threads, by_columns);
  if (geometry.splits > 1) {
    const int64_t before_last = int64_t{geometry.channel_tiles - 1} * geometry.tile_channels;
    for (const int64_t lists : {int64_t{geometry.tile_channels}, problem.channels - before_last}) {
      const int values = reduce_lists_scratch(threads, geometry.splits, static_cast<int>(lists));
      most = std::max(most, values * split_numbers);
    }
  }
  return most;
}

// --- Two passes, one block, elementwise ----------------------------------------------------------

class PassPlanner {
 public:
  PassPlanner(const Request& request, const Device& device, Algorithm algorithm)
      : request_(request), problem_(request.problem), device_(device) {
    plan_.algorithm = algorithm;
    plan_.epilogue = request.epilogue;
  }

  Plan plan() {
    map();
    cut_into_splits();
    Geometry& g = plan_.geometry;
    g.threads = count_threads(g, ceil_divide(g.extent, g.splits), kMaxThreads);
    g.thread_step = thread_step(g);
    plan_.block = g.threads;
    plan_.grid = int64_t{g.channel_tiles} * g.splits;
    plan_.vector_bytes = static_cast<int>(g.width * element_size(problem_.dtype));
    int numbers = record_numbers(request_.has_shift()) * g.tile_channels;
    if (plan_.algorithm != Algorithm::kElementwise) {
      numbers += scratch_numbers(problem_, g, plan_.block, statistics_numbers(1));
    }
    plan_.shared_bytes = numbers * accumulate_bytes(problem_);
    count_traffic();
    count_workspace();
    return plan_;
  }

 private:
  // Channel tiles as wide as merging their splits allows, and as narrow as possible where there is
  // one split.
  void map() {
    if (plan_.algorithm == Algorithm::kOneBlock) {
      plan_.geometry = map_elements(request_, kMaxNarrowing);
      return;
    }
    for (int narrowing = 0; narrowing <= kMaxNarrowing; ++narrowing) {
      plan_.geometry = map_elements(request_, narrowing);
      const int64_t splits = std::max(1, device_.multiprocessors / plan_.geometry.channel_tiles);
      if (splits * plan_.geometry.tile_channels <= kMaxMerged) break;
    }
  }

  void cut_into_splits() {
    Geometry& g = plan_.geometry;
    if (plan_.algorithm == Algorithm::kOneBlock) return;
    // A block is worth one round of loads, and channel tiles in splits need a counter each.
    const Occupancy compiled = occupancy(g.mapping);
    const int64_t round = bytes_in_flight(compiled) / compiled.blocks;
    const int64_t max_splits = g.channel_tiles > kCountedTiles
                                   ? 1
                                   : std::clamp<int64_t>(channel_tile_bytes(problem_, g) / round, 1,
                                                         std::max<int64_t>(1, g.extent));
    g.splits =
        static_cast<int>(splits_that_fill_waves(resident_blocks(device_, g.mapping), max_splits));
  }

  // The fewest splits that leave little of the last wave of blocks empty, of which `at_once` are
  // resident at once.
  int64_t splits_that_fill_waves(int64_t at_once, int64_t max_splits) const {
    const int64_t channel_tiles = plan_.geometry.channel_tiles;
    int64_t best = 1;
    double best_filled = 0;
    for (int64_t waves = 1; waves <= kMaxWaves; ++waves) {
      const int64_t splits = std::clamp<int64_t>(waves * at_once / channel_tiles, 1, max_splits);
      const int64_t blocks = channel_tiles * splits;
      const double filled =
          static_cast<double>(blocks) / static_cast<double>(round_up(blocks, at_once));
      if (waves > 1 && filled <= best_filled + kWorthCutting) continue;
      best = splits;
      best_filled = filled;
    }
    return best;
  }

  void count_traffic() {
    const int64_t pass = tensor_bytes(problem_);
    const Traffic traffic = traffic_of(request_);
    const int64_t mask = mask_bytes(problem_);
    plan_.bytes_read =
        (traffic.reduce_reads + traffic.apply_reads) * pass + traffic.mask_reads * mask;
    plan_.bytes_written = traffic.writes * pass + traffic.mask_writes * mask;
    plan_.floor_bytes = (traffic.inputs() + traffic.writes) * pass + traffic.masks() * mask;
    plan_.launches = plan_.algorithm == Algorithm::kOneBlock ? 1 : traffic.passes();
    plan_.overlap_launches = plan_.launches == 2 && device_.is_hopper_or_later();
  }

  void count_workspace() {
    if (plan_.algorithm != Algorithm::kTwoPass) return;
    constexpr int64_t kAlignment = 256;
    const Geometry& g = plan_.geometry;
    const int64_t channel_bytes = problem_.channels * accumulate_bytes(problem_);
    const int64_t partials = g.splits > 1 ? statistics_numbers(1) * g.splits * channel_bytes : 0;
    plan_.needs_counters = g.splits > 1;
    plan_.coefficients_offset = round_up(partials, kAlignment);
    plan_.workspace_bytes = plan_.coefficients_offset + kCoefficients * channel_bytes;
  }

  const Request& request_;
  const Problem& problem_;
  const Device& device_;
  Plan plan_;
};

// --- Persistent ----------------------------------------------------------------------------------

class PersistentPlanner {
 public:
  PersistentPlanner(const Request& request, const Device& device, Algorithm algorithm)
      : request_(request),
        problem_(request.problem),
        device_(device),
        algorithm_(algorithm),
        traffic_(traffic_of(request)),
        tensors_(traffic_.inputs()) {}

  void for_each(const Consider& consider) const {
    if (request_.cumulative) return;
    int channel_tiles = 0;
    for (int narrowing = 0; narrowing <= kMaxNarrowing; ++narrowing) {
      const Geometry geometry = map_elements(request_, narrowing);
      if (!has_whole_vectors(problem_, geometry)) return;
      if (geometry.channel_tiles == channel_tiles) continue;
      channel_tiles = geometry.channel_tiles;
      for (const int together : {1, 2}) with_blocks(geometry, together, consider);
    }
  }

 private:
  // The candidates with `together` blocks to a multiprocessor.
  void with_blocks(const Geometry& geometry, int together, const Consider& consider) const {
    switch (algorithm_) {
      case Algorithm::kPersistentBlock:
        with_cta_group(geometry, together, CtaGroup::kBlock, 1, together * device_.multiprocessors,
                       consider);
        break;
      case Algorithm::kPersistentCluster:
        for (size_t size = 1; size < kClusterSizes; ++size) {
          const auto& clusters = together == 1 ? device_.clusters : device_.half_clusters;
          with_cta_group(geometry, together, CtaGroup::kCluster, 1 << size, clusters[size],
                         consider);
        }
        break;
      default:
        if (!device_.is_hopper_or_later() || !device_.cooperative) return;
        const int available = std::max(0, device_.multiprocessors - request_.free_multiprocessors);
        for (int cta_groups = 1; cta_groups <= std::min(kMaxCtaGroups, geometry.channel_tiles);
             ++cta_groups) {
          with_cta_group(geometry, together, CtaGroup::kGrid, together * available / cta_groups,
                         cta_groups, consider);
        }
    }
  }

  // The candidate with CTA groups of `blocks` blocks, `at_once` of which run at once.
  void with_cta_group(Geometry geometry, int together, CtaGroup cta_group, int blocks,
                      int64_t at_once, const Consider& consider) const {
    if (blocks > geometry.extent || at_once < 1 || (cta_group != CtaGroup::kBlock && blocks < 2))
      return;
    Plan plan;
    plan.algorithm = algorithm_;
    plan.epilogue = request_.epilogue;
    plan.blocks_per_multiprocessor = together;
    geometry.splits = blocks;
    Persistence& persistence = geometry.persistence;
    persistence.cta_group = cta_group;
    // As few CTA groups as do the channel tiles in as many rounds: none idles long in the last one.
    const int64_t rounds = ceil_divide(geometry.channel_tiles, at_once);
    persistence.cta_groups = static_cast<int>(ceil_divide(geometry.channel_tiles, rounds));
    const int64_t split_extent = ceil_divide(geometry.extent, blocks);
    persistence.copies = tile_copies(geometry);
    const int producers = persistence.copies == TileCopies::kVectors ? 0 : kWarpThreads;
    const int most = kMaxThreads * kPersistentBlocks / together - producers;
    if (most < geometry.vectors || most < geometry.tile_channels) return;
    geometry.threads = count_threads(geometry, split_extent, most);
    geometry.thread_step = thread_step(geometry);
    plan.block = geometry.threads + producers;
    if (!fill_shared_memory(geometry, plan, split_extent, rounds)) return;

    plan.geometry = geometry;
    plan.launches = 1;
    plan.grid = int64_t{persistence.cta_groups} * blocks;
    plan.cluster = cta_group == CtaGroup::kCluster ? blocks : 1;
    plan.vector_bytes = kVectorBytes;
    count_traffic(plan);
    count_workspace(plan);
    consider(plan);
  }

  TileCopies tile_copies(const Geometry& geometry) const {
    if (!device_.copy_engine) return TileCopies::kVectors;
    const bool rows_are_apart =
        geometry.mapping == Mapping::kMatrixColumns && geometry.channel_tiles > 1;
    if (rows_are_apart && row_bytes(problem_, geometry) >= kMinBoxRowBytes &&
        geometry.vectors * geometry.width <= kMaxBoxSide) {
      return TileCopies::kBoxes;
    }
    return contiguous_bytes(problem_, geometry) >= kMinSpanBytes ? TileCopies::kSpans
                                                                 : TileCopies::kVectors;
  }

  // Places everything in shared memory, with as many tiles of a split as there is room for. False
  // if those are few.
  bool fill_shared_memory(Geometry& geometry, Plan& plan, int64_t split_extent,
                          int64_t rounds) const {
    constexpr int64_t kAlignment = 128;  // that boxes want
    Persistence& persistence = geometry.persistence;
    const int acc = accumulate_bytes(problem_);
    const int64_t room = std::min(
        device_.shared_per_block,
        device_.shared_per_multiprocessor / plan.blocks_per_multiprocessor - kReservedShared);
    const int64_t numbers = record_numbers(request_.has_shift()) * geometry.tile_channels +
                            scratch_numbers(problem_, geometry, plan.block, partial_numbers());
    const bool in_cluster = persistence.cta_group == CtaGroup::kCluster;
    // Two barriers, and for each the partial results of all blocks of the cluster.
    const int64_t partials =
        in_cluster ? kPhases * (kBarrierBytes + partial_numbers() * acc * int64_t{geometry.splits} *
                                                    geometry.tile_channels)
                   : 0;
    persistence.partials_offset = static_cast<int>(round_up(numbers * acc, kVectorBytes));
    persistence.barriers_offset =
        static_cast<int>(round_up(persistence.partials_offset + partials, kVectorBytes));

    // A tile is a round of the block's threads, and all tiles have evenly many rows or vectors: in
    // any split tile_extent or one fewer.
    const int64_t row = geometry.mapping == Mapping::kMatrixColumns ? row_bytes(problem_, geometry)
                                                                    : int64_t{kVectorBytes};
    const int64_t round_extent = std::max<int64_t>(
        1, geometry.threads * vectors_of_each(kSmemVectors, tensors_) * kVectorBytes / row);
    const int64_t tiles = ceil_divide(split_extent, round_extent);
    const int64_t tile_extent = ceil_divide(split_extent, tiles);
    const bool boxes = persistence.copies == TileCopies::kBoxes;
    const int64_t tile_bytes = round_up(tile_extent * row, boxes ? kAlignment : kVectorBytes);
    const int64_t stage_bytes = tensors_ * tile_bytes;
    const int64_t max_stages = (room - persistence.barriers_offset - kAlignment) /
                               (stage_bytes + kStageBarriers * kBarrierBytes);
    const int64_t stages = std::min(max_stages, tiles * rounds);
    const int64_t in_smem = std::min(stages, tiles);
    if (static_cast<double>(in_smem) < kMinInSmem * static_cast<double>(tiles) || in_smem < 1) {
      return false;
    }
    persistence.tile_extent = static_cast<int>(tile_extent);
    persistence.tiles = static_cast<int>(in_smem);
    persistence.stages = static_cast<int>(stages);
    if (boxes) {
      const bool are_all_whole = in_smem * tile_extent <= geometry.extent / geometry.splits;
      persistence.box_rows = persistence.tile_extent - (are_all_whole ? 0 : 1);
    }
    persistence.tile_bytes = static_cast<int>(tile_bytes);
    persistence.stages_offset = static_cast<int>(round_up(
        persistence.barriers_offset + stages * kStageBarriers * kBarrierBytes, kAlignment));
    plan.shared_bytes = static_cast<int>(persistence.stages_offset + stages * stage_bytes);
    return true;
  }

  void count_traffic(Plan& plan) const {
    const Persistence& persistence = plan.geometry.persistence;
    const int64_t pass = tensor_bytes(problem_);
    // Every split keeps as many rows in shared memory, but for those that have fewer.
    const int64_t per_split = int64_t{persistence.tiles} * persistence.tile_extent;
    const int64_t splits = plan.geometry.splits;
    const int64_t least = plan.geometry.extent / splits;
    const int64_t larger = plan.geometry.extent % splits;
    const int64_t smem_extent =
        larger * std::min(per_split, least + 1) + (splits - larger) * std::min(per_split, least);
    const int64_t row = pass / plan.geometry.extent;  // over all channel tiles
    const int64_t beyond = (plan.geometry.extent - smem_extent) * row;
    const int64_t mask = mask_bytes(problem_);
    plan.bytes_read =
        tensors_ * pass + traffic_.again_reads * beyond + (traffic_.mask_reads > 0 ? mask : 0);
    plan.bytes_written =
        traffic_.writes * pass + traffic_.again_writes * beyond + traffic_.mask_writes * mask;
    plan.floor_bytes = (tensors_ + traffic_.writes) * pass + traffic_.masks() * mask;
  }

  void count_workspace(Plan& plan) const {
    if (plan.geometry.persistence.cta_group != CtaGroup::kGrid) return;
    plan.needs_counters = true;
    // Partial results from each block of a CTA group, and one result back, double buffered.
    const int64_t partials =
        int64_t{plan.geometry.persistence.cta_groups} * kPhases * (plan.geometry.splits + 1);
    plan.workspace_bytes =
        partials * partial_numbers() * plan.geometry.tile_channels * accumulate_bytes(problem_);
  }

  // Numbers that a block passes to its CTA group about a channel.
  int partial_numbers() const {
    return request_.operation == Operation::kForward ? kMomentsNumbers : kGradSumsNumbers;
  }

  // Spans of fewer bytes, or boxes of shorter rows, would keep the copy engine busier than threads.
  static constexpr int64_t kMinSpanBytes = 512;
  static constexpr int64_t kMinBoxRowBytes = 128;
  // Rows or columns of a box at most. Tiles do not have more rows.
  static constexpr int kMaxBoxSide = 256;
  static_assert(kMaxThreads * kSmemVectors * kVectorBytes / kMinBoxRowBytes <= kMaxBoxSide);

  const Request& request_;
  const Problem& problem_;
  const Device& device_;
  const Algorithm algorithm_;
  const Traffic traffic_;
  const int tensors_;  // activations that are read
};

}  // namespace

void for_each_candidate(const Request& request, const Device& device, Algorithm algorithm,
                        const Consider& consider) {
  if (is_persistent(algorithm)) {
    PersistentPlanner(request, device, algorithm).for_each(consider);
    return;
  }
  if (algorithm == Algorithm::kOneBlock) {
    if (request.cumulative || request.epilogue != EpilogueKind::kNone) return;
    if (tensor_bytes(request.problem) > kMaxOneBlockBytes) return;
  }
  Plan plan = PassPlanner(request, device, algorithm).plan();
  consider(plan);
}

std::string why_not(const Request& request, const Device& device, Algorithm algorithm) {
  if (request.cumulative) {
    return "momentum=None takes two launches, as blocks of one cannot tell whether another has "
           "counted the batch";
  }
  if (algorithm == Algorithm::kOneBlock && request.epilogue != EpilogueKind::kNone) {
    return "it is compiled for batch norm with nothing behind it";
  }
  if (algorithm == Algorithm::kOneBlock) {
    return "it is for tensors of up to " + std::to_string(kMaxOneBlockBytes) +
           " bytes, and this one has " + std::to_string(tensor_bytes(request.problem));
  }
  if (!has_whole_vectors(request.problem, map_elements(request))) {
    return "only aligned activations of whole 16-byte vectors stay in shared memory";
  }
  if (algorithm == Algorithm::kPersistentCluster && device.clusters[1] == 0) {
    return device.name + " has no clusters";
  }
  if (algorithm == Algorithm::kPersistentGrid && !device.is_hopper_or_later()) {
    return "it takes compute capability 9.0 or later, and " + device.name + " is of " +
           std::to_string(device.major) + "." + std::to_string(device.minor);
  }
  if (algorithm == Algorithm::kPersistentGrid && !device.cooperative) {
    return "it takes launches whose blocks all live at once, and " + device.name + " has none";
  }
  if (algorithm == Algorithm::kPersistentGrid &&
      request.free_multiprocessors >= device.multiprocessors) {
    return "FASTBN_CUDA_FREE_SMS leaves it none of the " + std::to_string(device.multiprocessors) +
           " multiprocessors";
  }
  return "too little of a channel's elements finds room in the shared memory of the blocks that " +
         device.name + " can let work on it together";
}

}  // namespace fastbn::cuda
