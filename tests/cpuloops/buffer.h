// SPDX-License-Identifier: BSD-3-Clause
//
// Memory that ends where the loops may not read or write any more, for an address sanitizer to see
// it.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>

#include "../../csrc/cpu/simd/loops.h"
#include "formats.h"

namespace fastbn::cpuloops {

constexpr int64_t kCacheLine = 64;

// Elements of a block from its first to its last, what lies between its rows included.
inline int64_t extent(const cpu::Block2d& block) {
  return (block.rows - 1) * block.row_stride + block.columns;
}

// `size` elements, the first of which is `front` elements behind the beginning of a cache line and
// of the allocation. All bytes are those of a NaN, in every dtype.
template <typename scalar_t>
class Buffer {
 public:
  explicit Buffer(int64_t size, int64_t front = 0)
      : size_(size),
        front_(front),
        memory_(static_cast<scalar_t*>(
            ::operator new((front + size) * sizeof(scalar_t), std::align_val_t{kCacheLine}))) {
    std::memset(static_cast<void*>(memory_), 0xff, (front + size) * sizeof(scalar_t));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { ::operator delete(memory_, std::align_val_t{kCacheLine}); }

  scalar_t* data() { return memory_ + front_; }
  int64_t size() const { return size_; }

  double operator[](int64_t i) const { return Type<scalar_t>::decode(memory_[front_ + i]); }
  void set(int64_t i, double value) { memory_[front_ + i] = Type<scalar_t>::encode(value); }

  // Whether an element, or all in front of the first one, are as they were at the beginning.
  bool untouched(int64_t i) const {
    scalar_t fresh;
    std::memset(static_cast<void*>(&fresh), 0xff, sizeof fresh);
    return std::memcmp(memory_ + front_ + i, &fresh, sizeof fresh) == 0;
  }
  bool front_untouched() const {
    for (int64_t i = -front_; i < 0; ++i) {
      if (!untouched(i)) return false;
    }
    return true;
  }

 private:
  int64_t size_, front_;
  scalar_t* memory_;
};

}  // namespace fastbn::cpuloops
