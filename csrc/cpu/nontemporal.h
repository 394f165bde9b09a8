// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "../core/problem.h"

namespace fastbn::cpu {

// Outputs of this size leave the cache before anyone reads them: writing them past it saves reading
// their old contents first. Below kMinStreamedRow of adjacent bytes too many cache lines are
// written in parts, which costs more.
constexpr int64_t kMinStreamedBytes = 16 << 20;
constexpr int64_t kMinStreamedRow = 2 << 10;
constexpr int64_t kCacheLine = 64;

inline bool streams(const Problem& problem) {
  const int64_t size = element_size(problem.dtype);
  if (problem.per_channel() * problem.channels * size < kMinStreamedBytes) return false;
  switch (problem.layout) {
    case Layout::kContiguous:
      return problem.spatial * size >= kMinStreamedRow;
    case Layout::kChannelsLast:
      return problem.channels * size % kCacheLine == 0;
    case Layout::kGeneric:
      break;
  }
  return false;
}

}  // namespace fastbn::cpu
