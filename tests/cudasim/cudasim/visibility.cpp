// SPDX-License-Identifier: BSD-3-Clause
//
// Which stores to global memory a thread may rely on. The simulator's memory has no caches, so what
// a missing fence would do on the GPU is found by keeping account.
#include <algorithm>
#include <array>

#include "machine.h"
#include "memory.h"

namespace fastbn::cudasim {
namespace {

// The stores a thread sees that not all do, from those the fewest see to those the most see.
std::array<std::vector<Store>*, 4> known_stores(Thread& thread) {
  Block& block = *thread.block;
  Warp& warp = block.warps[static_cast<size_t>(thread.index / kWarpThreads)];
  return {&thread.stores, &warp.barrier.stores, &block.barrier.stores,
          &block.cluster->barrier.stores};
}

}  // namespace

void note_store(Buffer& buffer, uintptr_t address, int64_t bytes) {
  buffer.unpublished.insert(address, bytes);
  current->stores.push_back({&buffer, address, bytes});
}

void gather_stores(Barrier& barrier) {
  for (Thread* thread : barrier.waiting) {
    for (std::vector<Store>* stores : known_stores(*thread)) {
      if (stores == &barrier.stores) break;
      barrier.stores.insert(barrier.stores.end(), stores->begin(), stores->end());
      stores->clear();
    }
  }
}

void fence_device() {
  for (std::vector<Store>* stores : known_stores(*current)) {
    for (const Store& store : *stores) store.buffer->unpublished.erase(store.address, store.bytes);
    stores->clear();
  }
}

bool knows_store(uintptr_t address, int64_t bytes) {
  const auto overlaps = [&](const Store& store) {
    return store.address < address + static_cast<uintptr_t>(bytes) &&
           address < store.address + static_cast<uintptr_t>(store.bytes);
  };
  const auto known = known_stores(*current);
  return std::any_of(known.begin(), known.end(), [&](const std::vector<Store>* stores) {
    return std::any_of(stores->begin(), stores->end(), overlaps);
  });
}

}  // namespace fastbn::cudasim
