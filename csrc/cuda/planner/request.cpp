// SPDX-License-Identifier: BSD-3-Clause
#include "request.h"

#include "../geometry.h"

namespace fastbn::cuda {

namespace {

template <typename... Activations>
bool all_aligned(const Activations&... activations) {
  return ((reinterpret_cast<uintptr_t>(activations.data) % kVectorBytes == 0) && ...);
}

Traffic backward_traffic(const Request& request) {
  // A row of partial results has both sums, whatever else is wanted.
  const bool want_sums =
      request.want_dweight || request.want_dbias || request.steps == Steps::kReduce;
  if (request.training && request.want_dx) {
    return {/*dy and x*/ 2, /*dy and x*/ 2, /*dx*/ 1};
  }
  // With given statistics dx waits for no sums: it is written in the pass that takes them, or
  // follows from dy alone.
  if (want_sums) return {2, 0, request.want_dx};
  return {0, request.want_dx, request.want_dx};
}

}  // namespace

Request request(const TrainingForward& op) {
  Request request;
  request.operation = Operation::kForward;
  request.problem = op.problem;
  request.steps = op.steps;
  request.aligned = all_aligned(op.x, op.y);
  request.cumulative = op.running.cumulative;
  return request;
}

Request request(const EvalForward& op) {
  Request request;
  request.operation = Operation::kEval;
  request.problem = op.problem;
  request.aligned = all_aligned(op.x, op.y);
  return request;
}

Request request(const Backward& op) {
  Request request;
  request.operation = Operation::kBackward;
  request.problem = op.problem;
  request.steps = op.steps;
  request.aligned = all_aligned(op.dy, op.x, op.dx);
  request.training = op.training;
  request.want_dx = op.dx.data != nullptr;
  request.want_dweight = op.dweight.data != nullptr;
  request.want_dbias = op.dbias.data != nullptr;
  return request;
}

Traffic traffic_of(const Request& request) {
  Traffic traffic;
  switch (request.operation) {
    case Operation::kForward:
      traffic = {/*x*/ 1, /*x*/ 1, /*y*/ 1};
      break;
    case Operation::kEval:
      return {0, 1, 1};
    case Operation::kBackward:
      traffic = backward_traffic(request);
      break;
  }
  if (request.steps == Steps::kReduce) traffic.apply_reads = traffic.writes = 0;
  if (request.steps == Steps::kApply) traffic.reduce_reads = 0;
  return traffic;
}

int64_t tensor_bytes(const Problem& problem) {
  return problem.per_channel() * problem.channels * element_size(problem.dtype);
}

}  // namespace fastbn::cuda
