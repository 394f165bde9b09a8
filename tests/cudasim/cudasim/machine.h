// SPDX-License-Identifier: BSD-3-Clause
//
// What gpu.h stands on: the thread that runs, and the calls by which it waits for others. Part of
// the simulator behind gpu.h; not for its users.
//
// Threads are fibers of one host thread. A thread runs until it has to wait; then any of those that
// can go on does, by a draw. So whatever happens between two waits of a thread is one step to all
// others, and a missing barrier shows as a result that depends on the draw, or as the NaN that
// shared memory holds until it is written.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "../../../csrc/cuda/geometry.h"
#include "../../../csrc/cuda/gpu/launch_shape.h"
#include "cudasim.h"
#include "fiber.h"
#include "knowledge.h"
#include "shared_accesses.h"

namespace fastbn::gpu {
struct TensorMap;
}

namespace fastbn::cudasim {

using cuda::kWarpThreads;

// The line of kernel code that called.
struct Site {
  const char* file = nullptr;
  int line = 0;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

struct Block;
struct Buffer;
struct Cluster;

// An asynchronous copy that has not landed.
struct Copy {
  void* shared;
  const void* global;  // null to become zero
  int64_t bytes;
  bool in_bulk = false;
};

// A store to a block of the cluster that has not landed.
struct PeerStore {
  void* shared;
  int64_t bytes;
  unsigned char value[16];
  Knowledge knowledge;  // of who stored
};

// A store to global memory.
struct Store {
  Buffer* buffer;
  uintptr_t address;
  int64_t bytes;
};

// A store of a range from shared memory.
struct BulkStore {
  void* global;
  const void* shared;
  int64_t bytes;
  bool is_read = false;
};

// Those of a thread, and how many groups of them there were.
struct BulkStores {
  Agent agent = 0;      // that they read as, in the epoch of their group; none if 0
  Epoch last = 0;       // the group of the last store
  Epoch committed = 0;  // groups
  Epoch read = 0;       // of these, waited for
  std::vector<BulkStore> open;
  std::vector<std::vector<BulkStore>> groups;
};

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  int index = 0;
  bool may_touch_written = true;   // the kernel before is done, or was never overlapped
  const char* waits_in = nullptr;  // the function of gpu.h
  Site waits_at;
  const void* waits_for = nullptr;  // the barrier that it waits in wait_barrier() for
  int64_t polls = 0;                // load_relaxed() and load_acquire() calls since `polled_epoch`
  uint64_t polled_epoch = 0;
  std::vector<Copy> copies;   // that no barrier waits for yet
  std::vector<Store> stores;  // that no other thread is sure to see
  Knowledge knowledge;        // of what all agents did
  Epoch epoch = 1;            // ends when others may come to know of it, and with a fence
  std::vector<Epoch> fences;  // that ended with a fence_async_proxy()
  BulkStores bulk_stores;
};

// Where a fixed number of threads wait for each other.
struct Barrier {
  int expected = 0;
  int returned = 0;  // threads that left the kernel and will never come
  int64_t passes = 0;
  Site site;  // of the threads that wait
  std::vector<Thread*> waiting;
  std::vector<Store> stores;  // that its threads are sure to see, but no others
};

struct Warp {
  static constexpr int kSlotBytes = 80;

  Barrier barrier;
  // Two sets in turn: a thread may write the next while others still read the last.
  unsigned char slots[2][kWarpThreads][kSlotBytes];
};

// A barrier in shared memory that waits for arrivals and copies.
struct CopyBarrierState {
  Agent agent = 0;   // that its copies write as: in the epoch that is one more than the phase
  int arrivals = 0;  // a phase waits for
  int missing_arrivals = 0;
  int landing_arrivals = 0;  // of those, which are made when the copies land
  int64_t missing_bytes = 0;
  uint64_t phase = 0;
  // Who initialized it, and when.
  Agent initializer = 0;
  Epoch initialized = 0;
  bool is_stored_to = false;  // by blocks of the cluster
  std::vector<Copy> copies;
  std::vector<PeerStore> peer_stores;
  std::vector<Thread*> waiting;
  Knowledge of_arrivals;  // what those who have arrived knew
  Knowledge of_phases;    // the same of phases that have ended
};

struct Block {
  Cluster* cluster = nullptr;
  int64_t index = 0;
  int rank = 0;  // in the cluster
  int returned = 0;
  bool started = false;
  bool read_relaxed = false;  // a counter, and nothing that acquires since
  std::vector<unsigned char> storage;
  unsigned char* shared = nullptr;  // in the storage, between red zones
  std::vector<Thread> threads;
  Barrier barrier;
  std::vector<Warp> warps;
  std::map<const void*, CopyBarrierState> copy_barriers;
  SharedAccesses accesses;
  // What a thread is told that has not waited for an agent which is no thread: all of them, in the
  // order of their numbers.
  std::vector<const char*> engines = {kNotArrived};

  static constexpr const char* kNotArrived =
      "which copy_async() may still be writing: no arrive_when_copied() and wait_barrier() since";

  Agent add_engine(const char* not_waited_for);
};

// Blocks that live at once; a block without a cluster is one of its own.
struct Cluster {
  std::vector<Block> blocks;
  Barrier barrier;
  int live_blocks = 0;
};

using gpu::LaunchShape;

// The launch that runs, and its thread that does.
extern LaunchShape shape;
extern Thread* current;

// Runs `body(arguments)` on every thread of the grid. Returns null, or why it cannot be launched.
const char* run(const LaunchShape& shape, const void* kernel, void (*body)(const void*),
                const void* arguments);

// Ends the launch with an error at the current thread.
[[noreturn]] void fail(const std::string& what);

// A draw from [0, count).
uint64_t draw(uint64_t count);

// Suspends the current thread until someone resumes it.
void suspend(const char* function, Site site);
void resume(Thread& thread);
void resume_all(std::vector<Thread*>& threads);  // and empties the list

// Threads of an earlier launch that still sleep in load_relaxed() or load_acquire().
void forget_sleepers();

// Who sees a store: the thread itself, those it has met at a barrier since, and all once it or one
// of those has fenced.
void note_store(Buffer& buffer, uintptr_t address, int64_t bytes);
void gather_stores(Barrier& barrier);
bool knows_store(uintptr_t address, int64_t bytes);  // the current thread does

// Ends the current thread's epoch, and returns what it knows, its own doings among that.
const Knowledge& tell_knowledge();
// Lets threads know what any of them does.
void share_knowledge(const std::vector<Thread*>& threads);

// An address in the block's shared memory, in words.
std::string describe_shared(const Block& block, const void* address);
// What a barrier still waits for, in words.
std::string describe_barrier(const Block& block, const void* barrier);

// The functions of gpu.h by the same names.
void fence_device();
void sync_block(Site site);
void sync_warp(Site site);
void sync_cluster(Site site);
void* peer_shared(void* own, int rank);
void allow_next_kernel();
void wait_for_previous_kernel();
unsigned atomic_inc_wrap(unsigned* counter, unsigned last);
unsigned add_acq_rel(unsigned* counter, unsigned value);
unsigned load_relaxed(const unsigned* address, Site site);
unsigned load_acquire(const unsigned* address, Site site);

// Gives each thread of a warp the value of the lane it asks for.
void exchange(const void* value, int bytes, int source_lane, void* result, const char* function,
              Site site);

void copy_async(void* shared, const void* global);
void arrive_when_copied(void* barrier);
void init_barrier(void* barrier, int arrivals);
void arrive(void* barrier, Site site);
void expect_bytes(void* barrier, int64_t bytes);
void bulk_copy(void* shared, const void* global, int64_t bytes, void* barrier);
void bulk_copy_2d(void* shared, const gpu::TensorMap* map, int64_t column, int64_t row,
                  void* barrier);
void wait_barrier(void* barrier, int parity, Site site);
void wait_barrier_cluster(void* barrier, int parity, Site site);
void store_async(void* own, int rank, const void* value, int64_t bytes, void* own_barrier,
                 Site site);
void load_shared(const void* address, int64_t bytes);
void store_shared(void* address, int64_t bytes);
void fence_async_proxy();
void bulk_store(void* global, const void* shared, int64_t bytes);
void bulk_store_2d(const gpu::TensorMap* map, int64_t column, int64_t row, const void* shared);
void commit_bulk_stores();
void wait_bulk_stores_read(int pending);

// Fails where the current thread returns too early.
void check_bulk_stores_read();

// True if the bytes are the block's own shared memory.
bool in_shared(const Block& block, const void* address, int64_t bytes);

}  // namespace fastbn::cudasim
