// SPDX-License-Identifier: BSD-3-Clause
//
// Stores to the shared memory of blocks of the cluster. They land one by one, in any order, as late
// as the barrier that counts them is waited for; until then their destination is poisoned.
#include <cstring>
#include <string>
#include <utility>

#include "copy_barriers.h"

namespace fastbn::cudasim {
namespace {

constexpr SharedAccess kStoreAsync = {"store_async()", /*writes=*/true, /*in_async_proxy=*/false};

}  // namespace

void store_async(void* own, int rank, const void* value, int64_t bytes, void* own_barrier,
                 Site site) {
  check_range("store_async() to", own, bytes, bytes);
  void* address = peer_shared(own, rank);
  void* barrier = peer_shared(own_barrier, rank);
  Block& peer = current->block->cluster->blocks[static_cast<size_t>(rank)];
  CopyBarrierState& state = find_barrier(peer, barrier, "store_async()");
  const auto phase = static_cast<Epoch>(state.phase);
  if (phase > 0 && !current->knowledge.covers(rank, state.agent, phase)) {
    fail("store_async() of bytes that may count for any phase of the barrier at " +
         describe_shared(peer, barrier) + ": not known is that phase " + std::to_string(phase - 1) +
         " has ended");
  }
  peer.accesses.touch(peer, address, bytes, kStoreAsync, state.agent, phase + 1);
  std::memset(address, kPoison, static_cast<size_t>(bytes));
  PeerStore store;
  store.shared = address;
  store.bytes = bytes;
  std::memcpy(store.value, value, static_cast<size_t>(bytes));
  store.knowledge = tell_knowledge();
  state.is_stored_to = true;
  state.peer_stores.push_back(std::move(store));
  check_expected(peer, barrier, state, "store_async()");
  resume_all(state.waiting);
  resume(*current);
  suspend("store_async()", site);
}

void check_expected(const Block& block, const void* barrier, const CopyBarrierState& state,
                    const char* function) {
  int64_t missing = state.missing_bytes;
  for (const PeerStore& store : state.peer_stores) missing -= store.bytes;
  if (!state.is_stored_to || state.missing_arrivals > 0 || missing >= 0) return;
  fail(std::string(function) + ": blocks of the cluster have stored " + std::to_string(-missing) +
       " bytes more than phase " + std::to_string(state.phase) + " of the barrier at " +
       describe_shared(block, barrier) + " expects");
}

void land_one(CopyBarrierState& state) {
  std::vector<PeerStore>& stores = state.peer_stores;
  std::swap(stores[draw(stores.size())], stores.back());
  const PeerStore store = std::move(stores.back());
  stores.pop_back();
  check_poison(store.shared, store.bytes);
  std::memcpy(store.shared, store.value, static_cast<size_t>(store.bytes));
  state.missing_bytes -= store.bytes;
  state.of_arrivals.add(store.knowledge);
}

}  // namespace fastbn::cudasim
