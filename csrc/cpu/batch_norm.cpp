// SPDX-License-Identifier: BSD-3-Clause
//
// Which way through memory.
#include "batch_norm.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "simd/loops.h"

namespace fastbn::cpu {

namespace {

// Channels-last activations of so few channels and elements are not worth joining rows for, and may
// not fill one.
constexpr int64_t kMinJoinedChannels = 64;
constexpr int64_t kMinJoinedElements = 1024;

// FASTBN_CPU_LAYOUT=generic sends everything the general way, to tell a fault of a fast one.
bool only_generic() {
  static const char* const layout = std::getenv("FASTBN_CPU_LAYOUT");
  if (layout == nullptr) return false;
  if (std::strcmp(layout, "generic") == 0) return true;
  throw std::invalid_argument(std::string("FASTBN_CPU_LAYOUT is '") + layout +
                              "'; it may be generic");
}

// The layout to compute in: kGeneric where rows would be shorter than a vector.
Layout choose_layout(const Problem& problem) {
  if (only_generic()) return Layout::kGeneric;
  switch (problem.layout) {
    case Layout::kContiguous:
      return fills_vectors({1, 0, problem.spatial}) ? Layout::kContiguous : Layout::kGeneric;
    case Layout::kChannelsLast:
      return problem.channels < kMinJoinedChannels &&
                     problem.per_channel() * problem.channels < kMinJoinedElements
                 ? Layout::kGeneric
                 : Layout::kChannelsLast;
    case Layout::kGeneric:
      break;
  }
  return Layout::kGeneric;
}

template <typename Op>
void run(Op op, void (*contiguous)(const Op&), void (*channels_last)(const Op&)) {
  op.problem.layout = choose_layout(op.problem);
  (op.problem.layout == Layout::kChannelsLast ? channels_last : contiguous)(op);
}

}  // namespace

void training_forward(const TrainingForward& op) {
  const RunningStatistics& running = op.running;
  if (running.num_batches_tracked != nullptr && !running.counted) ++*running.num_batches_tracked;
  run(op, contiguous::training_forward, channels_last::training_forward);
}

void eval_forward(const EvalForward& op) {
  run(op, contiguous::eval_forward, channels_last::eval_forward);
}

void backward(const Backward& op) { run(op, contiguous::backward, channels_last::backward); }

}  // namespace fastbn::cpu
