// SPDX-License-Identifier: BSD-3-Clause
//
// A stand-in for what gives calls their memory: torch's allocator, the module's counters and the
// state of streams. Its rules are torch's, and an Error says which was broken: a pool that serves a
// graph, or that the program swaps, has no place for what outlives the call, and a graph's replays
// may run beside the stream on which it was captured.
#pragma once

#include <cudasim/cudasim.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "../../csrc/cuda/counters.h"

namespace fastbn::cudasim {

// What calls got since the last report.
struct MemoryReport {
  std::vector<int64_t> allocations;  // bytes of each
  int64_t cleared_bytes = 0;
};

// Where calls run.
struct CurrentStream {
  int64_t id = 0;
  bool capturing = false;
};

// See CallWorkspace in csrc/cuda/workspace.h.
class StreamMemory {
 public:
  struct Free {
    void operator()(void* block) const {
      unregister_buffer(block);
      live().erase(block);
      std::free(block);
    }
  };
  using Block = std::unique_ptr<void, Free>;

  static CurrentStream& current() {
    static CurrentStream stream;
    return stream;
  }
  static MemoryReport& report() {
    static MemoryReport report;
    return report;
  }

  bool is_capturing() const { return current().capturing; }

  cuda::Counters* counters() {
    static cuda::CounterSlots slots;
    static std::vector<cuda::Counters> module(cuda::kCounterSlots);
    if (is_capturing()) {
      throw Error("replays of a captured call would count on counters of the stream");
    }
    counters_ = slots.of(0, current().id, [] { return module.data(); });
    if (counters_ != nullptr) {
      register_buffer(counters_, sizeof(cuda::Counters), "counters", Kind::kWorkspace,
                      /*writable=*/true);
    }
    return counters_;
  }

  // Poisoned: nobody may rely on what new memory holds.
  Block allocate(int64_t bytes) {
    Block block(std::malloc(static_cast<size_t>(bytes)));
    std::memset(block.get(), 0xff, static_cast<size_t>(bytes));
    register_buffer(block.get(), bytes, "workspace", Kind::kWorkspace, /*writable=*/true);
    live()[block.get()] = bytes;
    report().allocations.push_back(bytes);
    return block;
  }

  void clear(void* data, int64_t bytes) {
    std::memset(data, 0, static_cast<size_t>(bytes));
    report().cleared_bytes += bytes;
  }

  // After a call: nothing it got is left, and its stream's counters are as they were.
  void check_end_of_call() const {
    for (const auto& [block, bytes] : live()) {
      throw Error("a block of " + std::to_string(bytes) + " bytes outlives its " +
                  (is_capturing() ? "capture" : "call"));
    }
    if (counters_ == nullptr) return;
    for (int i = 0; i < cuda::kCountedTiles; ++i) check_zero("counter", i, counters_->tiles[i]);
    for (int i = 0; i < cuda::kMaxCtaGroups; ++i) {
      check_zero("barrier", i, counters_->barriers[i] & 0x7fffffff);
    }
  }

 private:
  static std::map<void*, int64_t>& live() {
    static std::map<void*, int64_t> blocks;
    return blocks;
  }

  static void check_zero(const char* name, int index, unsigned left) {
    if (left == 0) return;
    throw Error(std::string(name) + " " + std::to_string(index) + " was left at " +
                std::to_string(left) + " instead of zero");
  }

  cuda::Counters* counters_ = nullptr;
};

}  // namespace fastbn::cudasim
