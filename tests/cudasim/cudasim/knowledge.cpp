// SPDX-License-Identifier: BSD-3-Clause
#include "knowledge.h"

#include <algorithm>

namespace fastbn::cudasim {

bool Knowledge::covers(int rank, Agent agent, Epoch epoch) const {
  const auto block = static_cast<size_t>(rank);
  const auto entry = static_cast<size_t>(agent);
  return blocks_ != nullptr && block < blocks_->size() && (*blocks_)[block] != nullptr &&
         entry < (*blocks_)[block]->size() && (*(*blocks_)[block])[entry] >= epoch;
}

void Knowledge::add(int rank, Agent agent, Epoch epoch) {
  if (covers(rank, agent, epoch)) return;
  Block& block = own_block(rank);
  const auto entry = static_cast<size_t>(agent);
  if (block.size() <= entry) block.resize(entry + 1);
  block[entry] = epoch;
}

void Knowledge::add(const Knowledge& other) {
  if (other.blocks_ == nullptr || other.blocks_ == blocks_) return;
  if (blocks_ == nullptr) {
    blocks_ = other.blocks_;
    return;
  }
  for (size_t rank = 0; rank < other.blocks_->size(); ++rank) {
    const std::shared_ptr<Block>& theirs = (*other.blocks_)[rank];
    if (theirs == nullptr || (rank < blocks_->size() && (*blocks_)[rank] == theirs)) continue;
    Block& own = own_block(static_cast<int>(rank));
    if (own.size() < theirs->size()) own.resize(theirs->size());
    for (size_t i = 0; i < theirs->size(); ++i) own[i] = std::max(own[i], (*theirs)[i]);
  }
}

Knowledge::Blocks& Knowledge::own_blocks() {
  if (blocks_ == nullptr) {
    blocks_ = std::make_shared<Blocks>();
  } else if (blocks_.use_count() > 1) {
    blocks_ = std::make_shared<Blocks>(*blocks_);
  }
  return *blocks_;
}

Knowledge::Block& Knowledge::own_block(int rank) {
  Blocks& blocks = own_blocks();
  const auto index = static_cast<size_t>(rank);
  if (blocks.size() <= index) blocks.resize(index + 1);
  std::shared_ptr<Block>& block = blocks[index];
  if (block == nullptr) {
    block = std::make_shared<Block>();
  } else if (block.use_count() > 1) {
    block = std::make_shared<Block>(*block);
  }
  return *block;
}

}  // namespace fastbn::cudasim
