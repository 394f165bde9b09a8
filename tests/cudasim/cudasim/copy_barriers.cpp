// SPDX-License-Identifier: BSD-3-Clause
//
// Barriers in shared memory. What they wait for lands as late as it may: when a thread waits.
#include "copy_barriers.h"

#include <cstring>
#include <string>
#include <utility>

namespace fastbn::cudasim {
namespace {

constexpr int64_t kBarrierBytes = 8;
constexpr int64_t kMostExpectedBytes = (1 << 20) - 1;

// What a barrier holds of the hardware's state, to notice when something else is written over it.
constexpr uint64_t kBarrierMark = 0xC0B1B0A1E5C0B1B0;

void end_phase_if_complete(const Block& block, CopyBarrierState& state) {
  if (state.missing_arrivals > 0 || state.missing_bytes != 0) return;
  ++state.phase;
  state.missing_arrivals = state.arrivals;
  state.of_arrivals.add(block.rank, state.agent, static_cast<Epoch>(state.phase));
  state.of_phases = state.of_arrivals;
}

void arrive_now(CopyBarrierState& state) {
  state.of_arrivals.add(tell_knowledge());
  end_phase_if_complete(*current->block, state);
  resume_all(state.waiting);
}

}  // namespace

CopyBarrierState& find_barrier(Block& block, const void* barrier, const char* function) {
  const auto found = block.copy_barriers.find(barrier);
  if (found == block.copy_barriers.end()) {
    fail(std::string(function) + " of a barrier that init_barrier() was not called for");
  }
  uint64_t mark;
  std::memcpy(&mark, barrier, sizeof(mark));
  if (mark != kBarrierMark) fail(std::string(function) + " of a barrier that was written over");
  CopyBarrierState& state = found->second;
  const bool is_own = &block == current->block && state.initializer == current->index;
  if (!is_own && !current->knowledge.covers(block.rank, state.initializer, state.initialized)) {
    fail(std::string(function) + " of the barrier at " + describe_shared(block, barrier) +
         ", which thread " + std::to_string(state.initializer) +
         " has initialized with no barrier since");
  }
  return state;
}

CopyBarrierState& find_barrier(const void* barrier, const char* function) {
  return find_barrier(*current->block, barrier, function);
}

void count_arrival(CopyBarrierState& state, const char* function) {
  if (state.missing_arrivals == state.landing_arrivals) {
    fail(std::string(function) + " once more than the barrier has arrivals");
  }
  --state.missing_arrivals;
}

std::string describe_barrier(const Block& block, const void* barrier) {
  const CopyBarrierState& state = block.copy_barriers.at(barrier);
  return " for phase " + std::to_string(state.phase) + " of the barrier at " +
         describe_shared(block, barrier) + ", which misses " +
         std::to_string(state.missing_arrivals) + " of " + std::to_string(state.arrivals) +
         " arrivals and " + std::to_string(state.missing_bytes) + " bytes";
}

void init_barrier(void* barrier, int arrivals) {
  check_range("init_barrier() in", barrier, kBarrierBytes, kBarrierBytes);
  if (arrivals < 1) fail("init_barrier() for no arrivals");
  std::memcpy(barrier, &kBarrierMark, sizeof(kBarrierMark));
  CopyBarrierState state;
  state.agent = current->block->add_engine(
      "which an asynchronous copy may still be writing: no wait_barrier() since");
  state.arrivals = arrivals;
  state.missing_arrivals = arrivals;
  state.initializer = current->index;
  state.initialized = current->epoch;
  current->block->copy_barriers[barrier] = std::move(state);
}

void arrive(void* barrier, Site site) {
  CopyBarrierState& state = find_barrier(barrier, "arrive()");
  count_arrival(state, "arrive()");
  arrive_now(state);
  // Others may go on before this thread does, which has not said that it needs them to wait.
  resume(*current);
  suspend("arrive()", site);
}

void expect_bytes(void* barrier, int64_t bytes) {
  CopyBarrierState& state = find_barrier(barrier, "expect_bytes()");
  if (bytes < 0 || bytes > kMostExpectedBytes) {
    fail("expect_bytes() of " + std::to_string(bytes) + " bytes, more than a barrier can count");
  }
  count_arrival(state, "expect_bytes()");
  state.missing_bytes += bytes;
  check_expected(*current->block, barrier, state, "expect_bytes()");
  arrive_now(state);
}

namespace {

void wait(void* barrier, int parity, const char* function, Site site) {
  for (;;) {
    CopyBarrierState& state = find_barrier(barrier, function);
    if (static_cast<int>(state.phase % 2) == parity) {
      for (const Copy& copy : state.copies) {
        if (copy.in_bulk) state.missing_bytes -= copy.bytes;
      }
      land(state.copies);
      state.missing_arrivals -= std::exchange(state.landing_arrivals, 0);
      end_phase_if_complete(*current->block, state);
      while (static_cast<int>(state.phase % 2) == parity && state.missing_arrivals == 0 &&
             !state.peer_stores.empty()) {
        land_one(state);
        end_phase_if_complete(*current->block, state);
      }
    }
    if (static_cast<int>(state.phase % 2) != parity) {
      current->knowledge.add(state.of_phases);
      resume_all(state.waiting);
      return;
    }
    state.waiting.push_back(current);
    current->waits_for = barrier;
    suspend(function, site);
  }
}

}  // namespace

void wait_barrier(void* barrier, int parity, Site site) {
  wait(barrier, parity, "wait_barrier()", site);
  if (!find_barrier(barrier, "wait_barrier()").is_stored_to) return;
  fail("wait_barrier() for what blocks of the cluster store: wait_barrier_cluster() lets see that");
}

void wait_barrier_cluster(void* barrier, int parity, Site site) {
  wait(barrier, parity, "wait_barrier_cluster()", site);
}

}  // namespace fastbn::cudasim
