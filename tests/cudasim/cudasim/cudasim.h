// SPDX-License-Identifier: BSD-3-Clause
//
// The GPU simulator as its user sees it. Code written on gpu.h, compiled by a host compiler and
// linked with the runtime next to this file, runs on one CPU thread: gpu::launch() returns when
// the grid is done. Around it: register the buffers the kernels may touch, seed the scheduler,
// call the host code that launches, then take the report of what was launched and what memory
// traffic it caused. A kernel that breaks a rule of the machine makes launch() throw an Error that
// says which and where: an access out of bounds, misaligned, to read-only memory, or to what
// another thread wrote without a fence; barriers that not all reach; a wait that never ends; and so
// on. Everything here is global state for one host thread at a time. Kernels are named in reports
// where the program exports their names (-rdynamic), as shared objects do.
#pragma once

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastbn::cudasim {

// A kernel did what the machine does not define; the sentence names kernel, block and thread.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The simulated machine: an H200 unless changed, which may be done between launches.
struct Device {
  int multiprocessors = 132;
  int threads_per_multiprocessor = 2048;
  int blocks_per_multiprocessor = 32;
  int shared_per_multiprocessor = 228 * 1024;
  int shared_per_block = 227 * 1024;
  // Clusters of 1, 2, 4, 8 and 16 blocks that run at once, with a multiprocessor to each block.
  std::array<int, 5> clusters = {132, 66, 31, 15, 7};
  // How many blocks (clusters) of an ordinary grid take turns; a cooperative grid always runs
  // whole. One is fastest; with more, kernels whose blocks disturb each other show it.
  int blocks_at_once = 1;
};
Device& device();

// How many blocks of a shape fit a multiprocessor of it, and how many clusters of it run at once;
// none where that is not to be had. Registers are not known.
int active_blocks(int threads, int shared_bytes);
int active_clusters(int cluster_blocks, int threads, int shared_bytes);

// Fixes all random choices from here on: the order of blocks, which thread runs next, the order in
// which copies land.
void seed(uint64_t value);

// What a buffer holds; traffic is counted for each kind.
enum class Kind : int { kActivation, kVector, kWorkspace };
constexpr int kKinds = 3;

// Lets kernels read, and where `writable` write, these bytes. Buffers may overlap, as views of one
// tensor do; an access is right if any of them allows it, and counts for the first that does.
void register_buffer(const void* begin, int64_t bytes, std::string name, Kind kind, bool writable);
void unregister_buffer(const void* begin);
void clear_buffers();

// Memory accesses of threads. A histogram's entry i counts accesses of 2^i bytes.
struct Traffic {
  std::array<int64_t, 5> loads = {};  // asynchronous copies among them
  std::array<int64_t, 5> stores = {};
  int64_t bulk_copies = 0;
  int64_t box_copies = 0;  // of these, of boxes of a matrix
  int64_t bulk_bytes = 0;
  int64_t bulk_stores = 0;
  int64_t box_stores = 0;
  int64_t bulk_stored_bytes = 0;
  int64_t atomics = 0;  // in neither histogram, nor in the bytes; loads of counters are not counted

  int64_t read_bytes() const;
  int64_t written_bytes() const;
  Traffic& operator+=(const Traffic& other);
};

struct LaunchReport {
  std::string kernel;
  int64_t blocks = 0;
  int threads = 0;
  int shared_bytes = 0;
  int cluster_blocks = 1;
  bool cooperative = false;
  bool overlaps_previous = false;
  bool allows_next = false;      // some thread called allow_next_kernel()
  int64_t barriers = 0;          // sync_block() calls of the block that made the most
  int64_t cluster_barriers = 0;  // sync_cluster() calls of the cluster that made the most
  std::array<Traffic, kKinds> traffic;

  const Traffic& of(Kind kind) const { return traffic[static_cast<int>(kind)]; }
  Traffic total() const;
};

// Every launch since the last report, but for those that failed.
struct Report {
  std::vector<LaunchReport> launches;

  Traffic of(Kind kind) const;
  Traffic total() const;
};
Report take_report();

}  // namespace fastbn::cudasim
