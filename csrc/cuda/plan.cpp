// SPDX-License-Identifier: BSD-3-Clause
#include "plan.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>

namespace fastbn::cuda {

namespace {

constexpr int kWarp = 32;

// Vectors side by side in a slab of channels-last data: 512 bytes at most, which a warp reads at
// once, and 64 bytes at least, which is what memory fetches.
constexpr int kWidestSlab = 32;
constexpr int kNarrowestSlab = 4;
// A row that cannot be cut into slabs may be this wide.
constexpr int kWidestRow = 128;
// The most values per statistic that the last block of a slab has to merge: about a microsecond.
constexpr int64_t kMostMerged = 8448;

// What is worth a launch less: everything waits for the slowest block, so none may have much.
constexpr int64_t kTinyTensorBytes = 2 << 20;
constexpr int64_t kTinySlabBytes = 64 << 10;

// Waves of blocks to consider when slabs are cut up to fill the last one.
constexpr int kMostWaves = 8;
// How much fuller waves must get for slabs to be cut up more.
constexpr double kWorthCutting = 0.05;

// Channels are counted in 32 bits, and so are windows from the first of a part's first sample on: a
// part that does not begin with a sample adds few to those of one, or no memory holds the tensor.
constexpr int64_t kMostChannels = (int64_t{1} << 31) - 1;
constexpr int64_t kMostWindows = (int64_t{1} << 31) - (int64_t{1} << 27);

constexpr int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t multiple) {
  return ceil_divide(a, multiple) * multiple;
}

Divider divider(uint32_t divisor) {
  Divider by;
  by.divisor = divisor;
  while ((uint64_t{1} << by.shift) < divisor) ++by.shift;
  by.multiplier = static_cast<uint32_t>(
      ((uint64_t{1} << 32) * ((uint64_t{1} << by.shift) - divisor)) / divisor + 1);
  return by;
}

// Decides step by step: how elements map to threads, slabs and parts, then the algorithm's bill.
class Planner {
 public:
  Planner(const Request& request, const Device& device, Algorithm algorithm)
      : request_(request),
        problem_(request.problem),
        device_(device),
        element_bytes_(element_size(problem_.dtype)) {
    plan_.algorithm = algorithm;
  }

  Plan plan() {
    map_elements();
    cut_into_parts();
    count_threads();
    count_shared_memory();
    count_traffic();
    count_workspace();
    return plan_;
  }

  // Bytes of an activation that a block has at most.
  int64_t slab_bytes() const {
    const Geometry& g = plan_.geometry;
    const int64_t columns = g.mapping == Mapping::kColumns ? int64_t{g.vectors} * g.width : 1;
    const int64_t rows = g.mapping == Mapping::kColumns ? g.items : problem_.per_channel();
    return rows * columns * element_bytes_;
  }

 private:
  bool tiny() const { return plan_.algorithm == Algorithm::kTiny; }
  int vector_width() const { return static_cast<int>(kVectorBytes / element_bytes_); }

  // --- Mapping -----------------------------------------------------------------------------------

  void map_elements() {
    const Layout layout = problem_.layout;
    if (layout == Layout::kNSC) {
      if (!map_channels_last() && !map_folded()) map_single_columns();
    } else if (layout == Layout::kStrided || (!map_small_segments() && !map_segments())) {
      map_strided();
    }
    plan_.geometry.matrix_columns =
        plan_.geometry.mapping == Mapping::kColumns
            ? problem_.per_channel() * problem_.channels / plan_.geometry.items
            : 0;
  }

  bool map_channels_last() {
    if (!request_.aligned || problem_.channels % vector_width() != 0) return false;
    cut_into_slabs(problem_.channels / vector_width(), vector_width(), kWidestSlab, kNarrowestSlab);
    return true;
  }

  // Several positions to a row, so that rows are whole vectors though channels are not.
  bool map_folded() {
    const int64_t fold = vector_width() / std::gcd(problem_.channels, int64_t{vector_width()});
    const int64_t vectors = problem_.channels * fold / vector_width();
    if (!request_.aligned || problem_.per_channel() % fold != 0 || vectors > kWidestRow)
      return false;
    Geometry& g = plan_.geometry;
    g.mapping = Mapping::kColumns;
    g.width = vector_width();
    g.slabs = 1;
    g.slab_channels = static_cast<int>(problem_.channels);
    g.items = problem_.per_channel() / fold;
    g.vectors = static_cast<int>(vectors);
    g.repeats = static_cast<int>(fold);
    g.channel_step = 1;
    g.repeat_step = static_cast<int>(problem_.channels);
    return true;
  }

  void map_single_columns() { cut_into_slabs(problem_.channels, 1, kWidestRow, kWarp); }

  // Slabs as wide as merging their parts allows, and as narrow as possible where there is one part.
  void cut_into_slabs(int64_t vectors, int width, int widest, int narrowest) {
    int64_t slabs = 0;
    for (int64_t wide = tiny() ? narrowest : widest;; wide /= 2) {
      slabs = ceil_divide(vectors, wide);
      const int64_t parts = std::max<int64_t>(1, device_.multiprocessors / slabs);
      const int64_t merged = parts * std::min(wide, vectors) * width;
      if (wide <= narrowest || merged <= kMostMerged) break;
    }
    int64_t wide = ceil_divide(vectors, slabs);
    if (slabs > 1) wide = round_up(wide, narrowest);
    Geometry& g = plan_.geometry;
    g.mapping = Mapping::kColumns;
    g.width = width;
    g.slabs = static_cast<int>(ceil_divide(vectors, wide));
    g.slab_channels = static_cast<int>(wide * width);
    g.items = problem_.per_channel();
    g.vectors = static_cast<int>(wide);
  }

  // Segments that are no whole vectors, as many together as are.
  bool map_small_segments() {
    const int64_t spatial = problem_.spatial;
    const int64_t group = vector_width() / std::gcd(spatial, int64_t{vector_width()});
    const int64_t group_vectors = group * spatial / vector_width();
    if (!request_.aligned || group == 1 || problem_.channels % group != 0 ||
        group_vectors > kWidestRow) {
      return false;
    }
    const int64_t groups = problem_.channels / group;
    const int64_t together =
        tiny() ? 1 : std::clamp<int64_t>(kWidestSlab / group_vectors, 1, groups);
    Geometry& g = plan_.geometry;
    g.mapping = Mapping::kColumns;
    g.width = vector_width();
    g.slabs = static_cast<int>(ceil_divide(groups, together));
    g.slab_channels = static_cast<int>(group * together);
    g.items = problem_.batch;
    g.vectors = static_cast<int>(group_vectors * together);
    g.repeats = static_cast<int>(spatial);
    g.channel_step = static_cast<int>(spatial);
    g.repeat_step = 1;
    return true;
  }

  bool map_segments() {
    const int width = vector_width();
    const bool whole = problem_.spatial % width == 0;
    const int64_t windows =
        whole ? problem_.spatial / width : (problem_.spatial + 2 * width - 2) / width;
    if (!request_.aligned || windows > kMostWindows) return false;
    Geometry& g = plan_.geometry;
    g.mapping = Mapping::kSegments;
    g.width = width;
    g.slabs = static_cast<int>(problem_.channels);
    g.items = problem_.batch * windows;
    g.windows = divider(static_cast<uint32_t>(windows));
    return true;
  }

  void map_strided() {
    Geometry& g = plan_.geometry;
    g.mapping = Mapping::kStrided;
    g.width = 1;
    g.slabs = static_cast<int>(problem_.channels);
    g.items = problem_.per_channel();
  }

  // --- Parts -------------------------------------------------------------------------------------

  Occupancy occupancy() const {
    switch (plan_.geometry.mapping) {
      case Mapping::kColumns:
        return kColumnsOccupancy;
      case Mapping::kSegments:
        return kSegmentsOccupancy;
      case Mapping::kStrided:
        break;
    }
    return kStridedOccupancy;
  }

  void cut_into_parts() {
    Geometry& g = plan_.geometry;
    g.parts = 1;
    if (tiny()) return;
    // A block is worth one round of loads, and slabs in parts need a counter each.
    const int64_t round = bytes_in_flight(occupancy()) / occupancy().blocks;
    const int64_t most_parts =
        g.slabs > kCounters ? 1 : std::clamp<int64_t>(slab_bytes() / round, 1, g.items);
    const int64_t slots = int64_t{device_.multiprocessors} * occupancy().blocks;
    g.parts = static_cast<int>(parts_that_fill_waves(slots, most_parts));
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

  void count_threads() {
    const Geometry& g = plan_.geometry;
    const int64_t part_items = ceil_divide(g.items, g.parts);
    int64_t threads = part_items;
    if (g.mapping == Mapping::kColumns) {
      const int64_t rows = std::min<int64_t>(part_items, kMaxThreads / g.vectors);
      threads = rows * g.vectors;
    }
    // Each channel of a slab has a thread to finish it.
    threads = std::max<int64_t>(threads, g.slab_channels);
    plan_.block = static_cast<int>(std::min<int64_t>(round_up(threads, kWarp), kMaxThreads));
    plan_.grid = g.slabs * g.parts;
    plan_.vector_bytes = static_cast<int>(g.width * element_bytes_);
  }

  // --- The bill ----------------------------------------------------------------------------------

  int accumulate_bytes() const {
    return static_cast<int>(element_size(accumulate_dtype(problem_.dtype)));
  }

  // See block.cuh and reduce.cuh, whose trees hold all rows but the first.
  void count_shared_memory() {
    const Geometry& g = plan_.geometry;
    const int lanes = g.mapping == Mapping::kColumns ? g.width : 1;
    const int vectors = g.mapping == Mapping::kColumns ? g.vectors : 1;
    const int threads_tree = (plan_.block / vectors - 1) * vectors * gathered_numbers(lanes);
    const int lists_tree = plan_.block * gathered_numbers(1);
    const int columns = vectors * lanes * gathered_numbers(1);
    int numbers = kCoefficients * g.slab_channels;
    if (plan_.algorithm != Algorithm::kElementwise) {
      numbers += std::max(threads_tree, columns + lists_tree);
    }
    plan_.shared_bytes = numbers * accumulate_bytes();
  }

  void count_traffic() {
    const int64_t pass = problem_.per_channel() * problem_.channels * element_bytes_;
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
    const int64_t channel_bytes = problem_.channels * accumulate_bytes();
    const int64_t partials = g.parts > 1 ? gathered_numbers(1) * g.parts * channel_bytes : 0;
    plan_.partials_offset = round_up(kCounters * int64_t{sizeof(unsigned)}, kAlignment);
    plan_.coefficients_offset = plan_.partials_offset + round_up(partials, kAlignment);
    plan_.workspace_bytes = plan_.coefficients_offset + kCoefficients * channel_bytes;
  }

  const Request& request_;
  const Problem& problem_;
  const Device& device_;
  int64_t element_bytes_;
  Plan plan_;
};

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

}  // namespace

Plan plan(const Request& request, const Device& device, const std::string& forced) {
  if (forced != "auto" && forced != "split" && forced != "tiny") {
    throw std::invalid_argument("there is no algorithm '" + forced +
                                "'; choose auto, split or tiny");
  }
  if (request.problem.channels > kMostChannels) {
    throw std::invalid_argument("batch norm on a GPU supports up to " +
                                std::to_string(kMostChannels) + " channels, but got " +
                                std::to_string(request.problem.channels));
  }
  if (needs_no_sums(request)) return Planner(request, device, Algorithm::kElementwise).plan();
  if (!has_two_steps(request)) return Planner(request, device, Algorithm::kSplit).plan();
  if (forced == "tiny" && request.cumulative) {
    throw std::invalid_argument(
        "algorithm 'tiny' does not fit momentum=None: its blocks cannot tell whether one of them "
        "has counted the batch; choose auto or split");
  }
  if (forced != "split" && !request.cumulative) {
    Planner planner(request, device, Algorithm::kTiny);
    const Plan tiny = planner.plan();
    const Problem& problem = request.problem;
    const int64_t bytes = problem.per_channel() * problem.channels * element_size(problem.dtype);
    const bool is_tiny = bytes <= kTinyTensorBytes && planner.slab_bytes() <= kTinySlabBytes;
    if (forced == "tiny" || is_tiny) return tiny;
  }
  return Planner(request, device, Algorithm::kSplit).plan();
}

const char* name(Algorithm algorithm) {
  switch (algorithm) {
    case Algorithm::kElementwise:
      return "elementwise";
    case Algorithm::kSplit:
      return "split";
    case Algorithm::kTiny:
      return "tiny";
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
         number(plan.block) + " threads, " + number(plan.shared_bytes) + " bytes of shared memory)";
}

}  // namespace fastbn::cuda
