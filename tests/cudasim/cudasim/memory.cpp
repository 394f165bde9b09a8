// SPDX-License-Identifier: BSD-3-Clause
#include "memory.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "machine.h"

namespace fastbn::cudasim {
namespace {

constexpr int kWordBits = 64;

std::string quoted(const Buffer& buffer) {
  return "buffer '" + buffer.name + "' of " + std::to_string(buffer.end - buffer.begin) + " bytes";
}

std::string verb(const Access& access, int64_t bytes) {
  return std::string(access.function) + "() of " + std::to_string(bytes) + " bytes ";
}

}  // namespace

Memory memory;

template <typename Use>
void ByteSet::for_each_word(uintptr_t address, int64_t bytes, const Use& use) const {
  for (uintptr_t end = address + static_cast<uintptr_t>(bytes); address < end;) {
    const uintptr_t bit = address % kWordBits;
    const uintptr_t count = std::min<uintptr_t>(end - address, kWordBits - bit);
    const uint64_t bits = count == kWordBits ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
    use(address / kWordBits - first_word_, bits << bit);
    address += count;
  }
}

void ByteSet::resize(uintptr_t begin, uintptr_t end) {
  first_word_ = begin / kWordBits;
  words_.resize(end / kWordBits - first_word_ + 1);
}

void ByteSet::clear() { std::fill(words_.begin(), words_.end(), 0); }

void ByteSet::insert(uintptr_t address, int64_t bytes) {
  for_each_word(address, bytes, [&](uintptr_t word, uint64_t bits) { words_[word] |= bits; });
}

void ByteSet::erase(uintptr_t address, int64_t bytes) {
  for_each_word(address, bytes, [&](uintptr_t word, uint64_t bits) { words_[word] &= ~bits; });
}

bool ByteSet::has_any(uintptr_t address, int64_t bytes) const {
  bool found = false;
  for_each_word(address, bytes,
                [&](uintptr_t word, uint64_t bits) { found |= (words_[word] & bits) != 0; });
  return found;
}

void Memory::add(Buffer buffer) {
  if (buffer.writable) {
    buffer.stored.resize(buffer.begin, buffer.end);
    buffer.unpublished.resize(buffer.begin, buffer.end);
  }
  buffers_.push_back(std::move(buffer));
  last_ = {};
}

void Memory::remove(uintptr_t begin) {
  const auto starts_there = [&](const Buffer& buffer) { return buffer.begin == begin; };
  buffers_.erase(std::remove_if(buffers_.begin(), buffers_.end(), starts_there), buffers_.end());
  last_ = {};
}

void Memory::clear() {
  buffers_.clear();
  last_ = {};
}

void Memory::start_launch() {
  traffic_ = {};
  last_ = {};
  for (Buffer& buffer : buffers_) {
    buffer.stored.clear();
    buffer.unpublished.clear();
  }
}

std::string Memory::describe(uintptr_t address) const {
  const Buffer* nearest = nullptr;
  uintptr_t nearest_distance = 0;
  for (const Buffer& buffer : buffers_) {
    const uintptr_t distance = address < buffer.begin  ? buffer.begin - address
                               : address >= buffer.end ? address - buffer.end + 1
                                                       : 0;
    if (nearest == nullptr || distance < nearest_distance) {
      nearest = &buffer;
      nearest_distance = distance;
    }
  }
  if (nearest == nullptr) return "an address, while no buffer is registered";
  const auto offset = static_cast<int64_t>(address - nearest->begin);
  return "offset " + std::to_string(offset) + " of " + quoted(*nearest);
}

Buffer* Memory::look_up(uintptr_t address, int64_t bytes, const Access& access) {
  const Buffer* read_only = nullptr;
  for (Buffer& buffer : buffers_) {
    if (!buffer.contains(address, bytes)) continue;
    if (!access.stores || buffer.writable) return &buffer;
    read_only = &buffer;
  }
  if (read_only != nullptr) {
    fail(verb(access, bytes) + "at " + describe(address) + ", which is read-only");
  }
  fail(verb(access, bytes) + "at " + describe(address) + " is out of bounds");
}

void Memory::touch_writable(Buffer& buffer, uintptr_t address, int64_t bytes,
                            const Access& access) {
  if (!current->may_touch_written) {
    fail(verb(access, bytes) + "at " + describe(address) +
         ", which the previous kernel may be writing: no wait_for_previous_kernel() before it");
  }
  if (!access.sees_stores && buffer.stored.has_any(address, bytes)) {
    fail(verb(access, bytes) + "at " + describe(address) +
         ", which this kernel has written: its caches may hold what was there before");
  }
  if (access.is_atomic) return;
  if (access.stores) {
    buffer.stored.insert(address, bytes);
    if (access.arrives_later) {
      buffer.unpublished.insert(address, bytes);
    } else if (buffer.kind != Kind::kActivation) {
      note_store(buffer, address, bytes);  // activations are not what blocks talk to each other by
    }
  } else if (buffer.unpublished.has_any(address, bytes) && !knows_store(address, bytes)) {
    fail(verb(access, bytes) + "at " + describe(address) +
         ", which another thread wrote, with no fence_device() or barrier since, or a bulk store");
  } else if (current->block->read_relaxed && buffer.kind != Kind::kActivation &&
             buffer.stored.has_any(address, bytes)) {
    fail(verb(access, bytes) + "at " + describe(address) +
         ", which this kernel has written, after load_relaxed() with no load_acquire() since");
  }
}

void Memory::fail_alignment(const Buffer& buffer, uintptr_t address, int64_t bytes,
                            int64_t alignment, const Access& access) const {
  fail(verb(access, bytes) + "at offset " + std::to_string(address - buffer.begin) + " of " +
       quoted(buffer) + " is not at a multiple of " + std::to_string(alignment));
}

void register_buffer(const void* begin, int64_t bytes, std::string name, Kind kind, bool writable) {
  if (bytes < 0) throw std::invalid_argument("a buffer of less than no bytes");
  const auto address = reinterpret_cast<uintptr_t>(begin);
  memory.add({address, address + static_cast<uintptr_t>(bytes), std::move(name), kind, writable,
              /*stored=*/{}, /*unpublished=*/{}});
}

void unregister_buffer(const void* begin) { memory.remove(reinterpret_cast<uintptr_t>(begin)); }

void clear_buffers() { memory.clear(); }

}  // namespace fastbn::cudasim
