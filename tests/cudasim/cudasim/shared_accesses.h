// SPDX-License-Identifier: BSD-3-Clause
//
// Who has accessed which bytes of a block's shared memory, and whether that was in order: of two
// accesses to a byte, one of them a write, the later one must know of the earlier. Part of the
// simulator behind gpu.h; not for its users.
//
// Known to it are load_shared(), store_shared(), and what copies and bulk stores do. A plain access
// of a kernel is not: what is wrong with that shows in its results alone.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "knowledge.h"

namespace fastbn::cudasim {

struct Block;

// A way to reach shared memory.
struct SharedAccess {
  const char* function;  // of gpu.h
  bool writes;
  bool in_async_proxy;  // by the copy engine, which does not see what threads have not fenced
};

// To some bytes of a cell.
struct CellAccess {
  Epoch epoch;
  uint16_t agent;
  uint16_t bytes;  // a bit for each
};

// A few of them, most often none or one.
class CellAccesses {
 public:
  // Forgets the bytes of those for which `is_past`.
  template <typename IsPast>
  void remove(uint16_t bytes, const IsPast& is_past);
  void add(const CellAccess& access);
  template <typename Use>
  void for_each(const Use& use) const;

 private:
  CellAccess first_ = {};  // of no bytes where there is none
  std::unique_ptr<std::vector<CellAccess>> more_;
};

class SharedAccesses {
 public:
  // Checks and notes an access of the current thread, or of an agent at its command.
  void touch(Block& block, const void* address, int64_t bytes, const SharedAccess& access,
             Agent agent, Epoch epoch);

  // Whether what is there was written by threads, by store_shared(), every byte.
  bool is_of_threads(const Block& block, const void* address, int64_t bytes);

  // Hands what an agent wrote over to another.
  void hand_over(Block& block, const void* address, int64_t bytes, Agent agent, Epoch epoch);

 private:
  static constexpr uintptr_t kCellBytes = 16;

  struct Cell {
    CellAccesses writes;
    CellAccesses reads;
  };

  // Calls `use` with each cell that the bytes fall into, and the bits of those bytes.
  template <typename Use>
  void for_each_cell(const Block& block, const void* address, int64_t bytes, const Use& use);

  std::vector<Cell> cells_;
};

}  // namespace fastbn::cudasim
