// SPDX-License-Identifier: BSD-3-Clause
//
// Bulk stores from shared to global memory. Their source is read at once or, by a draw, as late as
// a wait for that.
#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "copy_barriers.h"
#include "memory.h"

namespace fastbn::cudasim {
namespace {

constexpr Access kBulkStore = {"bulk_store", /*stores=*/true, /*sees_stores=*/true,
                               /*is_atomic=*/false, /*arrives_later=*/true};
constexpr SharedAccess kBulkStoreReads = {"bulk_store()", /*writes=*/false,
                                          /*in_async_proxy=*/true};

void read_source(BulkStore& store) {
  if (std::exchange(store.is_read, true)) return;
  std::memcpy(store.global, store.shared, static_cast<size_t>(store.bytes));
}

}  // namespace

void fence_async_proxy() { current->fences.push_back(current->epoch++); }

void start_bulk_store(const void* shared, int64_t bytes, const SharedAccess& access) {
  Block& block = *current->block;
  BulkStores& stores = current->bulk_stores;
  if (stores.agent == 0) {
    stores.agent = block.add_engine(
        "which a bulk store may still be reading: no wait_bulk_stores_read() and barrier since");
  }
  stores.last = stores.committed + 1;
  block.accesses.touch(block, shared, bytes, access, stores.agent, stores.last);
}

void store_piece(void* global, const void* shared, int64_t bytes, const char* function) {
  Block& block = *current->block;
  if (!block.accesses.is_of_threads(block, shared, bytes)) {
    fail(std::string(function) + " of " + std::to_string(bytes) + " bytes at " +
         describe_shared(block, shared) + ", not all of which a store_shared() wrote");
  }
  BulkStore store = {global, shared, bytes};
  if (draw(2) == 0) read_source(store);
  current->bulk_stores.open.push_back(store);
}

void bulk_store(void* global, const void* shared, int64_t bytes) {
  check_bulk_range("bulk_store() from", shared, bytes);
  Traffic& traffic = memory.touch(global, bytes, kBulkAlignment, kBulkStore);
  ++traffic.bulk_stores;
  traffic.bulk_stored_bytes += bytes;
  start_bulk_store(shared, bytes, kBulkStoreReads);
  store_piece(global, shared, bytes, kBulkStoreReads.function);
}

void commit_bulk_stores() {
  BulkStores& stores = current->bulk_stores;
  ++stores.committed;
  stores.groups.push_back(std::exchange(stores.open, {}));
}

void wait_bulk_stores_read(int pending) {
  BulkStores& stores = current->bulk_stores;
  const auto waited = static_cast<int64_t>(stores.groups.size()) - pending;
  for (int64_t group = 0; group < waited; ++group) {
    for (BulkStore& store : stores.groups[static_cast<size_t>(group)]) read_source(store);
  }
  if (stores.agent == 0 || stores.committed <= static_cast<Epoch>(pending)) return;
  stores.read = std::max(stores.read, stores.committed - static_cast<Epoch>(pending));
  current->knowledge.add(current->block->rank, stores.agent, stores.read);
}

void check_bulk_stores_read() {
  if (current->bulk_stores.last > current->bulk_stores.read) {
    fail("returned while bulk stores may still be reading: no wait_bulk_stores_read() for them");
  }
}

}  // namespace fastbn::cudasim
