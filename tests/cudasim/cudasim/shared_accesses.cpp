// SPDX-License-Identifier: BSD-3-Clause
#include "shared_accesses.h"

#include <algorithm>
#include <set>
#include <string>

#include "machine.h"

namespace fastbn::cudasim {
namespace {

bool is_own(const Block& block, Agent agent) {
  return current->block == &block && current->index == agent;
}

bool is_known(const Block& block, const CellAccess& access) {
  return is_own(block, access.agent) ||
         current->knowledge.covers(block.rank, access.agent, access.epoch);
}

// Whether the thread that wrote has fenced since, before whatever let the current one know.
bool is_fenced(const Block& block, const CellAccess& write) {
  const std::vector<Epoch>& fences = block.threads[write.agent].fences;
  const auto fence = std::lower_bound(fences.begin(), fences.end(), write.epoch);
  return fence != fences.end() && is_known(block, {*fence, write.agent, 0});
}

std::string begin_of(const SharedAccess& access, const Block& block, const void* address,
                     int64_t bytes) {
  return std::string(access.function) + " of " + std::to_string(bytes) + " bytes at " +
         describe_shared(block, address) + ", ";
}

// What is missing between an earlier access and this one.
std::string missing(const Block& block, const CellAccess& earlier, bool wrote) {
  const auto threads = static_cast<size_t>(shape.threads);
  if (earlier.agent < threads) {
    return "which thread " + std::to_string(earlier.agent) + (wrote ? " wrote" : " has read") +
           ", with no barrier since";
  }
  return block.engines[earlier.agent - threads];
}

void touch_own(const void* address, int64_t bytes, const SharedAccess& access) {
  Block& block = *current->block;
  if (!in_shared(block, address, bytes)) {
    fail(std::string(access.function) + " outside the block's shared memory");
  }
  block.accesses.touch(block, address, bytes, access, current->index, current->epoch);
}

}  // namespace

Agent Block::add_engine(const char* not_waited_for) {
  engines.push_back(not_waited_for);
  return shape.threads + static_cast<Agent>(engines.size()) - 1;
}

const Knowledge& tell_knowledge() {
  current->knowledge.add(current->block->rank, current->index, current->epoch++);
  return current->knowledge;
}

void share_knowledge(const std::vector<Thread*>& threads) {
  Knowledge all;
  std::set<const void*> known;
  for (const Thread* thread : threads) {
    if (known.insert(thread->knowledge.identity()).second) all.add(thread->knowledge);
  }
  for (Thread* thread : threads) all.add(thread->block->rank, thread->index, thread->epoch++);
  for (Thread* thread : threads) thread->knowledge = all;
}

std::string describe_shared(const Block& block, const void* address) {
  return "byte " + std::to_string(static_cast<const unsigned char*>(address) - block.shared) +
         " of shared memory" +
         (current == nullptr || current->block == &block
              ? ""
              : " of block " + std::to_string(block.index));
}

void load_shared(const void* address, int64_t bytes) {
  touch_own(address, bytes, {"load_shared()", /*writes=*/false, /*in_async_proxy=*/false});
}

void store_shared(void* address, int64_t bytes) {
  touch_own(address, bytes, {"store_shared()", /*writes=*/true, /*in_async_proxy=*/false});
}

template <typename IsPast>
void CellAccesses::remove(uint16_t bytes, const IsPast& is_past) {
  if (first_.bytes != 0 && is_past(first_)) first_.bytes &= static_cast<uint16_t>(~bytes);
  if (more_ == nullptr) return;
  for (CellAccess& access : *more_) {
    if (is_past(access)) access.bytes &= static_cast<uint16_t>(~bytes);
  }
  more_->erase(std::remove_if(more_->begin(), more_->end(),
                              [](const CellAccess& access) { return access.bytes == 0; }),
               more_->end());
  if (more_->empty()) more_.reset();
}

void CellAccesses::add(const CellAccess& access) {
  if (first_.bytes == 0) {
    first_ = access;
    return;
  }
  if (more_ == nullptr) more_ = std::make_unique<std::vector<CellAccess>>();
  more_->push_back(access);
}

template <typename Use>
void CellAccesses::for_each(const Use& use) const {
  if (first_.bytes != 0) use(first_);
  if (more_ != nullptr) std::for_each(more_->begin(), more_->end(), use);
}

template <typename Use>
void SharedAccesses::for_each_cell(const Block& block, const void* address, int64_t bytes,
                                   const Use& use) {
  if (cells_.empty()) cells_.resize(static_cast<size_t>(shape.shared_bytes) / kCellBytes + 1);
  auto begin = reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(block.shared);
  for (const uintptr_t end = begin + static_cast<uintptr_t>(bytes); begin < end;) {
    const uintptr_t first = begin % kCellBytes;
    const uintptr_t count = std::min(end - begin, kCellBytes - first);
    use(cells_[begin / kCellBytes], static_cast<uint16_t>(((1u << count) - 1) << first));
    begin += count;
  }
}

void SharedAccesses::touch(Block& block, const void* address, int64_t bytes,
                           const SharedAccess& access, Agent agent, Epoch epoch) {
  const CellAccess now = {epoch, static_cast<uint16_t>(agent), 0};
  const auto is_same = [&](const CellAccess& other) {
    return other.agent == now.agent && other.epoch == now.epoch;
  };
  for_each_cell(block, address, bytes, [&](Cell& cell, uint16_t touched) {
    cell.writes.for_each([&](const CellAccess& write) {
      if ((write.bytes & touched) == 0 || is_same(write)) return;
      if (!is_known(block, write)) {
        fail(begin_of(access, block, address, bytes) + missing(block, write, /*wrote=*/true));
      }
      if (access.in_async_proxy && write.agent < shape.threads && !is_fenced(block, write)) {
        fail(begin_of(access, block, address, bytes) + "which thread " +
             std::to_string(write.agent) +
             " wrote, with no fence_async_proxy() and barrier after it since");
      }
    });
    const auto is_past = [&](const CellAccess& other) { return is_known(block, other); };
    if (access.writes) {
      cell.reads.for_each([&](const CellAccess& read) {
        if ((read.bytes & touched) == 0 || is_known(block, read)) return;
        fail(begin_of(access, block, address, bytes) + missing(block, read, /*wrote=*/false));
      });
      cell.writes.remove(touched, [](const CellAccess&) { return true; });
      cell.reads.remove(touched, is_past);
      cell.writes.add({now.epoch, now.agent, touched});
    } else {
      cell.reads.remove(touched, is_past);
      cell.reads.add({now.epoch, now.agent, touched});
    }
  });
}

bool SharedAccesses::is_of_threads(const Block& block, const void* address, int64_t bytes) {
  bool are_all = true;
  for_each_cell(block, address, bytes, [&](Cell& cell, uint16_t touched) {
    unsigned written = 0;
    cell.writes.for_each([&](const CellAccess& write) {
      if (write.agent < shape.threads) written |= write.bytes;
    });
    are_all &= (touched & ~written) == 0;
  });
  return are_all;
}

void SharedAccesses::hand_over(Block& block, const void* address, int64_t bytes, Agent agent,
                               Epoch epoch) {
  for_each_cell(block, address, bytes, [&](Cell& cell, uint16_t touched) {
    cell.writes.remove(touched, [](const CellAccess&) { return true; });
    cell.writes.add({epoch, static_cast<uint16_t>(agent), touched});
  });
}

}  // namespace fastbn::cudasim
