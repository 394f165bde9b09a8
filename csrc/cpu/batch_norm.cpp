// SPDX-License-Identifier: BSD-3-Clause
#include "batch_norm.h"

#include "loops.h"

namespace fastbn::cpu {

namespace {

// Fewer elements than this are not worth joining rows for, and may not fill one.
constexpr int64_t kLeastJoined = 1024;
constexpr int64_t kNarrow = 64;

// The same operation with its layout changed to kStrided where runs or tiles would be shorter than
// a vector.
template <typename Op>
Op with_full_vectors(Op op) {
  Problem& problem = op.problem;
  const bool short_runs = problem.layout == Layout::kNCS && problem.spatial < kMaxLanes;
  const bool narrow_tiles = problem.layout == Layout::kNSC && problem.channels < kNarrow &&
                            problem.per_channel() * problem.channels < kLeastJoined;
  if (short_runs || narrow_tiles) problem.layout = Layout::kStrided;
  return op;
}

}  // namespace

void training_forward(const TrainingForward& given) {
  if (given.num_batches_tracked != nullptr) ++*given.num_batches_tracked;
  const TrainingForward op = with_full_vectors(given);
  op.problem.layout == Layout::kNSC ? training_forward_tiles(op) : training_forward_runs(op);
}

void inference_forward(const InferenceForward& given) {
  const InferenceForward op = with_full_vectors(given);
  op.problem.layout == Layout::kNSC ? inference_forward_tiles(op) : inference_forward_runs(op);
}

void backward(const Backward& given) {
  const Backward op = with_full_vectors(given);
  op.problem.layout == Layout::kNSC ? backward_tiles(op) : backward_runs(op);
}

}  // namespace fastbn::cpu
