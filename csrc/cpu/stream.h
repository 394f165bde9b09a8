// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "../problem.h"

namespace fastbn::cpu {

// Outputs of this size leave the cache before anyone reads them: writing them past it saves reading
// their old contents first. Below kStreamRunBytes of adjacent elements too many cache lines are
// written in parts, which costs more.
constexpr int64_t kStreamBytes = 16 << 20;
constexpr int64_t kStreamRunBytes = 2 << 10;
constexpr int64_t kCacheLine = 64;

inline bool streams(const Problem& problem) {
  const int64_t size = element_size(problem.dtype);
  if (problem.per_channel() * problem.channels * size < kStreamBytes) return false;
  switch (problem.layout) {
    case Layout::kNCS:
      return problem.spatial * size >= kStreamRunBytes;
    case Layout::kNSC:
      return problem.channels * size % kCacheLine == 0;
    default:
      return false;
  }
}

}  // namespace fastbn::cpu
