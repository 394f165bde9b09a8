// SPDX-License-Identifier: BSD-3-Clause
//
// The model: bytes over what the busy multiprocessors can draw from memory, wave by wave, and what
// cannot hide behind that: launches, and the time in which blocks of a CTA group wait for each
// other and no data is on its way.
//
// No constant has been fitted to a device yet. They come from what is published of Hopper and from
// measurements of others: a copy reaches about 0.87 of the bandwidth; memory answers in 0.9 us
// under load; the last-level caches of A100, H100 and RTX 4090 deliver 4.5 to 5.6 TB/s, 42 GB/s to
// a multiprocessor; single kernels take 2.5 us at least, and a second one that overlaps the first
// half of that.
#include "cost.h"

#include <algorithm>

#include "../../core/mask.h"
#include "mapping.h"

namespace fastbn::cuda {

namespace {

constexpr double kReachable = 0.87;
// What a multiprocessor can draw if it has enough on its way, in even shares of the whole.
constexpr double kMaxShare = 1.5;
constexpr double kLatency = 0.9e-6;

// Bytes per second that a multiprocessor reads from the last-level cache, and how much of that is
// there for what was read last.
constexpr double kCacheRate = 42e9;
constexpr double kCacheShare = 0.5;

// Pieces of 64 bytes, far apart, keep the memory less busy than longer ones.
constexpr int64_t kLongPiece = 128;
constexpr double kShortPieceSpeed = 0.92;

constexpr double kLaunch = 2.5e-6;
constexpr double kNextLaunch = 2.5e-6;
constexpr double kOverlappedLaunch = 1.2e-6;

// Seconds from the last arrival of a channel tile's data to the first result: in a block, to merge
// what its threads have reduced; in a cluster besides a store to each peer and a wait for theirs, a
// round trip; on a grid two fences and two atomics to the last-level cache, a poll and a result to
// read back, 3.4 us, and the partial results of all blocks, which one reads: up to 5 us. Counted in
// round trips and instructions.
constexpr double kBlockPause = 1.0e-6;
constexpr double kClusterExchange = 1.2e-6;
constexpr double kGridExchange = 3.4e-6;
// The share of this pause that two blocks of different CTA groups on one multiprocessor do not hide
// for each other.
constexpr double kSharedPause = 0.33;

// Bytes per second that a multiprocessor takes through its tiles in shared memory, about 48 GB/s. A
// warp takes so many instructions for a vector that it reads or writes: 41 to reduce one and 33 to
// apply it, each and about 28 of what a stage of two costs besides, in machine code for compute
// capability 9.0. Four schedulers issue one each in a cycle, of 1.9 GHz, except where all their
// warps wait.
constexpr double kInstructionsPerVector = (69 + 61) / 2.0;
constexpr double kIssueRate = 0.8 * 4 * 1.9e9;
constexpr double kProcessing = kIssueRate / kInstructionsPerVector * kWarpThreads * kVectorBytes;

class Model {
 public:
  Model(const Request& request, const Device& device, const Plan& plan)
      : device_(device), plan_(plan), geometry_(plan.geometry) {
    const Problem& problem = request.problem;
    pass_ = static_cast<double>(tensor_bytes(problem));
    const Traffic traffic = traffic_of(request);
    tensors_ = traffic.inputs();
    again_ = traffic.again_reads;
    written_again_ = traffic.again_writes;
    moved_ = tensors_ + traffic.writes;
    if (traffic.masks() > 0) moved_ += static_cast<double>(mask_bytes(problem)) / pass_;
    channel_tile_ = pass_ / geometry_.channel_tiles;
    if (contiguous_bytes(problem, geometry_) < kLongPiece) speed_ = kShortPieceSpeed;
    cached_cost_ =
        std::min(1.0, kReachable * device.bandwidth / (kCacheRate * device.multiprocessors));
    partial_bytes_ =
        static_cast<double>(geometry_.tile_channels *
                            element_size(accumulate_dtype(problem.dtype))) *
        (request.operation == Operation::kBackward ? kGradSumsNumbers : kMomentsNumbers);
    const Occupancy compiled = occupancy(geometry_.mapping);
    in_flight_ = static_cast<double>(bytes_in_flight(compiled)) / kVectorBytes * plan.vector_bytes;
  }

  double seconds() const {
    if (is_persistent(plan_.algorithm)) return seconds_persistent();
    return plan_.algorithm == Algorithm::kOneBlock ? seconds_one_block() : seconds_two_pass();
  }

 private:
  // Bytes per second that so many multiprocessors draw from memory.
  double rate(double multiprocessors, bool streams) const {
    const double whole = kReachable * device_.bandwidth;
    double share = kMaxShare * whole / device_.multiprocessors;
    if (streams) share = std::min(share, in_flight_ / kLatency);
    return speed_ * std::min(whole, multiprocessors * share);
  }

  // What reading a byte again costs, next to the first time, if so many are read in between.
  double cost_again(double bytes) const {
    return bytes <= kCacheShare * static_cast<double>(device_.l2_bytes) ? cached_cost_ : 1;
  }

  // --- Two passes, and whatever takes one --------------------------------------------------------

  double seconds_two_pass() const {
    const int64_t at_once = resident_blocks(device_, geometry_.mapping);
    const int64_t waves = ceil_divide(plan_.grid, at_once);
    double bytes = static_cast<double>(plan_.bytes_read + plan_.bytes_written);
    double seconds = kLaunch;
    if (plan_.launches == 2) {
      const double cached = kCacheShare * static_cast<double>(device_.l2_bytes);
      bytes -= (1 - cached_cost_) * std::min(cached, again_ * pass_);
      seconds += plan_.overlap_launches ? kOverlappedLaunch : kNextLaunch;
    }
    // The last wave takes as long as a full one.
    if (waves > 1) bytes *= static_cast<double>(waves * at_once) / static_cast<double>(plan_.grid);
    const double blocks = static_cast<double>(std::min(plan_.grid, at_once));
    return seconds + bytes / rate(blocks / occupancy(geometry_.mapping).blocks, /*streams=*/true);
  }

  // --- One block ---------------------------------------------------------------------------------

  double seconds_one_block() const {
    // Everything waits for the slowest block, which reads its channel tile twice.
    const int64_t at_once = resident_blocks(device_, geometry_.mapping);
    const double waves = static_cast<double>(ceil_divide(geometry_.channel_tiles, at_once));
    const double live = static_cast<double>(std::min<int64_t>(geometry_.channel_tiles, at_once));
    const double reads = (1 + cost_again(live * tensors_ * channel_tile_)) * tensors_;
    const double one_tile = (reads + 1) * channel_tile_ / rate(1, /*streams=*/true) + kBlockPause;
    const double all = (reads + 1) * pass_ / rate(device_.multiprocessors, /*streams=*/true);
    return kLaunch + std::max(waves * one_tile, all);
  }

  // --- Persistent --------------------------------------------------------------------------------

  double seconds_persistent() const {
    const Persistence& persistence = geometry_.persistence;
    const int64_t waves = geometry_.channel_tiles / persistence.cta_groups;
    const int64_t left = geometry_.channel_tiles % persistence.cta_groups;
    double seconds = kLaunch;
    if (waves > 0) seconds += static_cast<double>(waves) * wave_seconds(persistence.cta_groups);
    if (left > 0) seconds += wave_seconds(static_cast<double>(left));
    return seconds;
  }

  double wave_seconds(double cta_groups) const {
    const Persistence& persistence = geometry_.persistence;
    const double multiprocessors = cta_groups * geometry_.splits / plan_.blocks_per_multiprocessor;
    const double split_extent =
        static_cast<double>(ceil_divide(geometry_.extent, geometry_.splits));
    const double in_smem =
        std::min(1.0, persistence.tiles * persistence.tile_extent / split_extent);
    const double read_again = (1 - in_smem) * again_ * channel_tile_;
    const double moved = moved_ + (1 - in_smem) * written_again_;
    const double bytes =
        cta_groups * (moved * channel_tile_ + cost_again(cta_groups * read_again) * read_again);
    const double speed = rate(multiprocessors, /*streams=*/false);
    // Bytes that are on their way while blocks wait for each other.
    const double spare = static_cast<double>(persistence.stages - persistence.tiles) *
                         persistence.tile_bytes * tensors_ * plan_.blocks_per_multiprocessor *
                         multiprocessors;
    const bool covers = plan_.blocks_per_multiprocessor > 1 && cta_groups > 1;
    const double uncovered = (covers ? kSharedPause : 1) * pause();
    const double moving = bytes / speed + std::max(0.0, uncovered - spare / speed);
    // However early data comes, a CTA group does one channel tile after another.
    const double processing =
        moved_ * channel_tile_ / geometry_.splits * plan_.blocks_per_multiprocessor / kProcessing;
    return std::max(moving, uncovered + processing);
  }

  double pause() const {
    switch (geometry_.persistence.cta_group) {
      case CtaGroup::kBlock:
        break;
      case CtaGroup::kCluster:
        return kBlockPause + kClusterExchange;
      case CtaGroup::kGrid:
        return kBlockPause + kGridExchange + geometry_.splits * partial_bytes_ / kCacheRate;
    }
    return kBlockPause;
  }

  const Device& device_;
  const Plan& plan_;
  const Geometry& geometry_;
  double pass_ = 0;           // bytes of an activation
  double channel_tile_ = 0;   // bytes of one activation in a channel tile
  double partial_bytes_ = 0;  // of a block to its CTA group
  double tensors_ = 1;        // activations that are read
  double again_ = 1;          // of them, those that are read twice unless they stay on chip
  double moved_ = 2;          // that are read or written, and a mask's share of one
  double written_again_ = 0;  // that are written twice unless they stay on chip
  double speed_ = 1;
  double cached_cost_ = 1;  // of a byte, next to one from memory
  double in_flight_ = 0;    // bytes of a multiprocessor that reads into registers
};

}  // namespace

int64_t resident_blocks(const Device& device, Mapping mapping) {
  return int64_t{device.multiprocessors} * occupancy(mapping).blocks;
}

double predict_seconds(const Request& request, const Device& device, const Plan& plan) {
  return Model(request, device, plan).seconds();
}

}  // namespace fastbn::cuda
