// SPDX-License-Identifier: BSD-3-Clause
//
// Where the memory of a call comes from.
//
// What blocks and kernels of a call pass on is the call's own: it is allocated for it, and given
// back as soon as the kernels are launched. That is safe, as the allocator hands it out again in
// the order of the stream, and necessary: an allocator that serves a graph, or a pool that is
// swapped, takes for lost what is kept.
//
// Counters are the stream's, and need neither allocating nor clearing. Replays of a graph, though,
// may run beside the stream on which it was captured: a call that is captured has counters of its
// own, which it clears, and so has one on a stream that has none.
#pragma once

#include <cstdint>
#include <utility>

#include "planner/types.h"

namespace fastbn::cuda {

// The memory that a plan asks for, until the end of the scope. A `Source` serves one stream:
//
//   bool is_capturing()
//   Counters* counters()              of the stream, that nobody else uses; null if it has none
//   Memory allocate(int64_t bytes)    freed by its destructor; has get()
//   void clear(void*, int64_t bytes)  in the order of the stream
template <typename Source>
class CallWorkspace {
 public:
  CallWorkspace(Source& source, const Plan& plan) {
    if (plan.needs_counters && !source.is_capturing()) workspace_.counters = source.counters();
    const bool own_counters = plan.needs_counters && workspace_.counters == nullptr;
    const int64_t counters_bytes = own_counters ? sizeof(Counters) : 0;
    if (counters_bytes + plan.workspace_bytes == 0) return;
    memory_ = source.allocate(counters_bytes + plan.workspace_bytes);
    if (own_counters) {
      workspace_.counters = static_cast<Counters*>(memory_.get());
      source.clear(workspace_.counters, counters_bytes);
    }
    char* partials = static_cast<char*>(memory_.get()) + counters_bytes;
    workspace_.partials = partials;
    workspace_.coefficients = partials + plan.coefficients_offset;
  }

  const Workspace& operator*() const { return workspace_; }

 private:
  using Memory = decltype(std::declval<Source&>().allocate(0));

  Memory memory_;
  Workspace workspace_;
};

}  // namespace fastbn::cuda
