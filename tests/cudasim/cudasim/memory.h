// SPDX-License-Identifier: BSD-3-Clause
//
// Global memory: the registered buffers, and the check and count of every access. Part of the
// simulator behind gpu.h; not for its users.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "cudasim.h"

namespace fastbn::cudasim {

// A way to reach global memory.
struct Access {
  const char* function;  // of gpu.h
  bool stores;
  bool sees_stores;  // what this kernel has written so far
  bool is_atomic = false;
  bool arrives_later = false;  // when the kernel ends
};

// A set of bytes within a range of addresses.
class ByteSet {
 public:
  void resize(uintptr_t begin, uintptr_t end);
  void clear();
  void insert(uintptr_t address, int64_t bytes);
  void erase(uintptr_t address, int64_t bytes);
  bool has_any(uintptr_t address, int64_t bytes) const;

 private:
  // Calls `use` with each word that the bytes fall into, and their bits.
  template <typename Use>
  void for_each_word(uintptr_t address, int64_t bytes, const Use& use) const;

  uintptr_t first_word_ = 0;
  std::vector<uint64_t> words_;
};

struct Buffer {
  uintptr_t begin;
  uintptr_t end;
  std::string name;
  Kind kind;
  bool writable;
  ByteSet stored;       // by the current kernel
  ByteSet unpublished;  // of these, what other blocks may not see yet

  bool contains(uintptr_t address, int64_t bytes) const {
    return address >= begin && address <= end && static_cast<int64_t>(end - address) >= bytes;
  }
};

class Memory {
 public:
  void add(Buffer buffer);
  void remove(uintptr_t begin);
  void clear();

  // Forgets what was counted and stored.
  void start_launch();

  // Checks an access, which must be aligned to `alignment`, and returns where to count it.
  Traffic& touch(const void* address, int64_t bytes, int64_t alignment, const Access& access) {
    const auto value = reinterpret_cast<uintptr_t>(address);
    Buffer* buffer = last_[access.stores];
    if (buffer == nullptr || !buffer->contains(value, bytes)) {
      buffer = look_up(value, bytes, access);
      last_[access.stores] = buffer;
    }
    if (value % static_cast<uintptr_t>(alignment) != 0) {
      fail_alignment(*buffer, value, bytes, alignment, access);
    }
    if (buffer->writable) touch_writable(*buffer, value, bytes, access);
    return traffic_[static_cast<int>(buffer->kind)];
  }

  const std::array<Traffic, kKinds>& traffic() const { return traffic_; }

  // An address as "offset 16 of buffer 'x'".
  std::string describe(uintptr_t address) const;

 private:
  Buffer* look_up(uintptr_t address, int64_t bytes, const Access& access);
  void touch_writable(Buffer& buffer, uintptr_t address, int64_t bytes, const Access& access);
  [[noreturn]] void fail_alignment(const Buffer& buffer, uintptr_t address, int64_t bytes,
                                   int64_t alignment, const Access& access) const;

  std::vector<Buffer> buffers_;
  std::array<Buffer*, 2> last_ = {};  // the buffer of the last load and of the last store
  std::array<Traffic, kKinds> traffic_ = {};
};
extern Memory memory;

}  // namespace fastbn::cudasim
