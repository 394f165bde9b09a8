// SPDX-License-Identifier: BSD-3-Clause
//
// What a thread knows to have happened: a vector clock. Part of the simulator behind gpu.h; not for
// its users.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace fastbn::cudasim {

// Who accesses a block's shared memory: its threads, by their index, and after them whatever does
// so for them, like the copies that a barrier waits for. Each counts epochs of its own.
using Agent = int;
using Epoch = uint32_t;

class Knowledge {
 public:
  // Whether all that an agent did up to an epoch is known; the agent is of the block of a rank.
  bool covers(int rank, Agent agent, Epoch epoch) const;

  void add(int rank, Agent agent, Epoch epoch);
  void add(const Knowledge& other);

  // The same for two who know the same.
  const void* identity() const { return blocks_.get(); }

 private:
  using Block = std::vector<Epoch>;  // of each agent the last that is known
  using Blocks = std::vector<std::shared_ptr<Block>>;

  Blocks& own_blocks();
  Block& own_block(int rank);

  // Shared by all who know the same, and copied before it changes.
  std::shared_ptr<Blocks> blocks_;
};

}  // namespace fastbn::cudasim
