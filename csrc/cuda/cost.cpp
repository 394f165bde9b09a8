// SPDX-License-Identifier: BSD-3-Clause
//
// The model: bytes over what the busy multiprocessors can draw from memory, wave by wave, and what
// cannot hide behind that: launches, and the time in which a team talks and nothing is on its way.
//
// No constant has been fitted to a device yet. They come from what is published of Hopper and from
// measurements of others: a copy reaches about 0.87 of the bandwidth; memory answers in 0.9 us
// under load; the last-level caches of A100, H100 and RTX 4090 deliver 4.5 to 5.6 TB/s, 42 GB/s to
// a multiprocessor; single kernels take 2.5 us at least, and a second one that overlaps the first
// half of that.
#include "cost.h"

#include <algorithm>

#include "mapping.h"

namespace fastbn::cuda {

namespace {

constexpr double kReachable = 0.87;
// What a multiprocessor can draw, in even shares of the whole, if it has enough on its way.
constexpr double kMostShares = 1.5;
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

// From the last arrival of a slab's data to the first result, by how blocks talk. On a grid one
// block reads the messages of all besides.
constexpr double kBlockPause = 1.0e-6;
constexpr double kClusterPause = 1.6e-6;
constexpr double kGridPause = 2.4e-6;
// How much of it blocks of two teams leave uncovered that share a multiprocessor.
constexpr double kSharedPause = 0.33;
// Bytes per second that a multiprocessor takes from its shared memory, about fifty instructions to
// a vector.
constexpr double kProcessing = 75e9;

class Model {
 public:
  Model(const Request& request, const Device& device, const Plan& plan)
      : device_(device), plan_(plan), geometry_(plan.geometry) {
    const Problem& problem = request.problem;
    pass_ =
        static_cast<double>(problem.per_channel() * problem.channels * element_size(problem.dtype));
    tensors_ = request.operation == Operation::kBackward ? 2 : 1;
    slab_ = pass_ / geometry_.slabs;
    if (run_bytes(problem, geometry_) < kLongPiece) speed_ = kShortPieceSpeed;
    cached_cost_ =
        std::min(1.0, kReachable * device.bandwidth / (kCacheRate * device.multiprocessors));
    message_ = static_cast<double>(geometry_.slab_channels *
                                   element_size(accumulate_dtype(problem.dtype))) *
               (tensors_ == 2 ? 2 : kMessageNumbers);
    const Occupancy compiled = occupancy(geometry_.mapping);
    in_flight_ = static_cast<double>(bytes_in_flight(compiled)) / kVectorBytes * plan.vector_bytes;
  }

  double seconds() const {
    if (on_chip(plan_.algorithm)) return seconds_on_chip();
    return plan_.algorithm == Algorithm::kTiny ? seconds_tiny() : seconds_in_passes();
  }

 private:
  // Of so many multiprocessors at work, bytes per second.
  double rate(double multiprocessors, bool streams) const {
    const double whole = kReachable * device_.bandwidth;
    double share = kMostShares * whole / device_.multiprocessors;
    if (streams) share = std::min(share, in_flight_ / kLatency);
    return speed_ * std::min(whole, multiprocessors * share);
  }

  // What a byte costs for the second time, if so many are read in between.
  double cost_again(double bytes) const {
    return bytes <= kCacheShare * static_cast<double>(device_.l2_bytes) ? cached_cost_ : 1;
  }

  // --- Split, and whatever takes one step --------------------------------------------------------

  double seconds_in_passes() const {
    const int64_t at_once = slots(device_, geometry_.mapping);
    const int64_t waves = ceil_divide(plan_.grid, at_once);
    double bytes = static_cast<double>(plan_.bytes_read + plan_.bytes_written);
    double seconds = kLaunch;
    if (plan_.launches == 2) {
      const double cached = kCacheShare * static_cast<double>(device_.l2_bytes);
      bytes -= (1 - cached_cost_) * std::min(cached, tensors_ * pass_);
      seconds += plan_.overlap_launches ? kOverlappedLaunch : kNextLaunch;
    }
    // The last wave takes as long as a full one.
    if (waves > 1) bytes *= static_cast<double>(waves * at_once) / static_cast<double>(plan_.grid);
    const double blocks = static_cast<double>(std::min(plan_.grid, at_once));
    return seconds + bytes / rate(blocks / occupancy(geometry_.mapping).blocks, /*streams=*/true);
  }

  // --- Tiny --------------------------------------------------------------------------------------

  double seconds_tiny() const {
    // Everything waits for the slowest block, which reads its slab twice.
    const int64_t at_once = slots(device_, geometry_.mapping);
    const double waves = static_cast<double>(ceil_divide(geometry_.slabs, at_once));
    const double live = static_cast<double>(std::min<int64_t>(geometry_.slabs, at_once));
    const double reads = (1 + cost_again(live * tensors_ * slab_)) * tensors_;
    const double one_slab = (reads + 1) * slab_ / rate(1, /*streams=*/true) + kBlockPause;
    const double all = (reads + 1) * pass_ / rate(device_.multiprocessors, /*streams=*/true);
    return kLaunch + std::max(waves * one_slab, all);
  }

  // --- On chip -----------------------------------------------------------------------------------

  double seconds_on_chip() const {
    const Residence& residence = geometry_.residence;
    const int64_t waves = geometry_.slabs / residence.teams;
    const int64_t left = geometry_.slabs % residence.teams;
    double seconds = kLaunch;
    if (waves > 0) seconds += static_cast<double>(waves) * wave_seconds(residence.teams);
    if (left > 0) seconds += wave_seconds(static_cast<double>(left));
    return seconds;
  }

  double wave_seconds(double teams) const {
    const Residence& residence = geometry_.residence;
    const double multiprocessors = teams * geometry_.parts / plan_.blocks_per_multiprocessor;
    const double part_items = static_cast<double>(ceil_divide(geometry_.items, geometry_.parts));
    const double held = std::min(1.0, residence.stages * residence.stage_items / part_items);
    const double read_again = (1 - held) * tensors_ * slab_;
    const double bytes =
        teams * ((tensors_ + 1) * slab_ + cost_again(teams * read_again) * read_again);
    const double speed = rate(multiprocessors, /*streams=*/false);
    // What is on its way while blocks talk.
    const double spare = static_cast<double>(residence.slots - residence.stages) *
                         residence.stage_bytes * tensors_ * plan_.blocks_per_multiprocessor *
                         multiprocessors;
    const bool covers = plan_.blocks_per_multiprocessor > 1 && teams > 1;
    const double uncovered = (covers ? kSharedPause : 1) * pause();
    const double moving = bytes / speed + std::max(0.0, uncovered - spare / speed);
    // However early data comes, a team does one slab after another.
    const double processing =
        (tensors_ + 1) * slab_ / geometry_.parts * plan_.blocks_per_multiprocessor / kProcessing;
    return std::max(moving, pause() + processing);
  }

  double pause() const {
    switch (geometry_.residence.team) {
      case Team::kBlock:
        break;
      case Team::kCluster:
        return kClusterPause;
      case Team::kGrid:
        return kGridPause + geometry_.parts * message_ / kCacheRate;
    }
    return kBlockPause;
  }

  const Device& device_;
  const Plan& plan_;
  const Geometry& geometry_;
  double pass_ = 0;  // bytes of an activation
  double slab_ = 0;
  double message_ = 0;  // of a block to its team
  double tensors_ = 1;  // that are read
  double speed_ = 1;
  double cached_cost_ = 1;  // of a byte, next to one from memory
  double in_flight_ = 0;    // bytes of a multiprocessor that reads into registers
};

}  // namespace

int64_t slots(const Device& device, Mapping mapping) {
  return int64_t{device.multiprocessors} * occupancy(mapping).blocks;
}

double predict_seconds(const Request& request, const Device& device, const Plan& plan) {
  return Model(request, device, plan).seconds();
}

}  // namespace fastbn::cuda
