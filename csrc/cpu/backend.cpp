// SPDX-License-Identifier: BSD-3-Clause
//
// The torch side of the CPU backend.
#include <ATen/Parallel.h>

#include "../ops/registration.h"
#include "batch_norm.h"
#include "parallel.h"

namespace fastbn::cpu {

// Fewer elements than this are done before another thread would have started.
constexpr int64_t kMinElementsPerThread = 32 << 10;

void parallel_for(int64_t tasks, int64_t elements_per_task,
                  const std::function<void(int64_t, int64_t)>& body) {
  const int64_t grain = (kMinElementsPerThread + elements_per_task) / (elements_per_task + 1);
  at::parallel_for(0, tasks, grain, body);
}

int num_threads() { return at::get_num_threads(); }

namespace {

constexpr Backend kBackend{training_forward, eval_forward, backward};

}  // namespace

}  // namespace fastbn::cpu

TORCH_LIBRARY_IMPL(fastbn, CPU, library) {
  fastbn::implement_operators<fastbn::cpu::kBackend>(library);
}
