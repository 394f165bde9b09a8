// SPDX-License-Identifier: BSD-3-Clause
//
// Counters that are zero without anyone clearing them: memory of the module, which no allocator
// gives or takes back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>

#include "geometry.h"

namespace fastbn::cuda {

// Of each device. A program rarely uses more streams.
constexpr size_t kCounterSlots = 32;

// The kCounterSlots counters of the current device.
Counters* module_counters();

// Gives each stream counters of its own, for good: its kernels, whose launches follow one another,
// leave them as they found them.
class CounterSlots {
 public:
  // Null for streams that come after kCounterSlots others. `first()` has those of the device.
  template <typename First>
  Counters* of(int device, int64_t stream, const First& first) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto& streams = devices_[device];
    const auto found = streams.find(stream);
    if (found != streams.end()) return found->second;
    if (streams.size() == kCounterSlots) return nullptr;
    Counters* counters = first() + streams.size();
    return streams.emplace(stream, counters).first->second;
  }

 private:
  std::mutex mutex_;
  std::map<int, std::map<int64_t, Counters*>> devices_;
};

}  // namespace fastbn::cuda
