// SPDX-License-Identifier: BSD-3-Clause
//
// Blocks and numbers that the loops are tested on.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "buffer.h"

namespace fastbn::cpuloops {

using cpu::Block2d;
using cpu::kMaxLanes;

// The same numbers everywhere, which the standard's distributions do not promise.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  // In [0, 1).
  double uniform() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<double>(state_ >> 11) * 0x1p-53;
  }
  // Of mean 0 and variance 1.
  double spread() { return (uniform() + uniform() + uniform() - 1.5) * 2; }

 private:
  uint64_t state_;
};

enum class Numbers {
  kSpread,    // about zero
  kOffset,    // far from zero
  kTiny,      // subnormal float16
  kConstant,  // all the same
  kOutliers,  // those that the loops sample first are far from the others
};

inline std::string name(Numbers numbers) {
  const char* names[] = {"spread", "offset", "tiny", "constant", "outliers"};
  return names[static_cast<int>(numbers)];
}

inline double draw(Numbers numbers, Random& random, bool early) {
  switch (numbers) {
    case Numbers::kSpread:
      return random.spread();
    case Numbers::kOffset:
      return 1000 + random.spread();
    case Numbers::kTiny:
      return 1e-6 * random.spread();
    case Numbers::kConstant:
      return 1.0 / 3;
    case Numbers::kOutliers:
      return (early ? 1000 : 0) + random.spread();
  }
  return 0;
}

// Fills the rows of a block and leaves NaN between them. The first `early` of the elements, or
// those of the first four rows in every third column, come before the others.
template <typename scalar_t>
void fill(Buffer<scalar_t>& buffer, const Block2d& block, Numbers numbers, bool columns,
          uint64_t seed) {
  Random random(seed);
  const int64_t early = 4 * kMaxLanes;
  for (int64_t row = 0; row < block.rows; ++row) {
    for (int64_t column = 0; column < block.columns; ++column) {
      const bool is_early =
          columns ? row < 4 && column % 3 == 0 : row * block.columns + column < early;
      buffer.set(row * block.row_stride + column, draw(numbers, random, is_early));
    }
  }
}

template <typename scalar_t>
void fill(Buffer<scalar_t>& buffer, double center, double spread, uint64_t seed) {
  Random random(seed);
  for (int64_t i = 0; i < buffer.size(); ++i) buffer.set(i, center + spread * random.spread());
}

// Every seventh element of a block is one of these.
template <typename scalar_t>
void strew_special(Buffer<scalar_t>& buffer, const Block2d& block) {
  const double infinity = std::numeric_limits<double>::infinity();
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const double special[] = {infinity, nan, -0.0, Type<scalar_t>::kSmallest, -infinity, 0.0};
  for (int64_t row = 0; row < block.rows; ++row) {
    for (int64_t column = row % 7; column < block.columns; column += 7) {
      buffer.set(row * block.row_stride + column, special[(row + column / 7) % 6]);
    }
  }
}

// For loops over rows: single ones of all lengths about the vectors and unrolled steps of all
// instruction sets, and several that fill the widest vector.
inline std::vector<Block2d> row_blocks() {
  std::vector<Block2d> blocks;
  for (int64_t length = 1; length <= 2 * 4 * kMaxLanes + 3; ++length) {
    blocks.push_back({1, length, length});
  }
  for (int64_t length : {255, 1000, 4096}) blocks.push_back({1, length, length});
  for (int64_t rows : {2, 3, 17}) {
    for (int64_t columns : {16, 17, 31, 32, 63, 64, 65, 129}) {
      for (int64_t gap : {0, 9}) blocks.push_back({rows, columns + gap, columns});
    }
  }
  return blocks;
}

// The same and one so long that moments about a pivot far from the mean would be wrong.
inline std::vector<Block2d> reduced_blocks() {
  std::vector<Block2d> blocks = row_blocks();
  blocks.push_back({1, 1 << 16, 1 << 16});
  return blocks;
}

// For loops over columns, whose rows fill a vector.
inline std::vector<Block2d> column_blocks() {
  std::vector<Block2d> blocks;
  for (int64_t rows : {1, 3, 4, 9, 17}) {
    for (int64_t columns : {16, 17, 31, 32, 33, 63, 64, 65, 129}) {
      for (int64_t gap : {0, 9}) blocks.push_back({rows, columns + gap, columns});
    }
  }
  blocks.push_back({64, 70, 70});
  blocks.push_back({9, 4096, cpu::kMaxBlockColumns});
  return blocks;
}

// What may be read in front of a block, at the least.
inline int64_t front_of(const Block2d& block) { return fills_vectors(block) ? 0 : kMaxLanes; }

// Where blocks begin in a cache line.
inline std::vector<int64_t> fronts_of(const Block2d& block) {
  std::vector<int64_t> fronts;
  for (int64_t front : {0, 1}) fronts.push_back(front_of(block) + front);
  return fronts;
}

}  // namespace fastbn::cpuloops
