// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>
#include <functional>

namespace fastbn::cpu {

// Runs body(begin, end) over contiguous ranges that together cover [0, tasks), on several threads
// when there is enough work for them. The only thing the loops need of the framework around them;
// backend.cpp supplies it.
void parallel_for(int64_t tasks, int64_t elements_per_task,
                  const std::function<void(int64_t begin, int64_t end)>& body);

int num_threads();

}  // namespace fastbn::cpu
