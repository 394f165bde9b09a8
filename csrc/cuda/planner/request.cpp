// SPDX-License-Identifier: BSD-3-Clause
#include "request.h"

namespace fastbn::cuda {

namespace {

template <typename... Activations>
bool all_aligned(const Activations&... activations) {
  return ((reinterpret_cast<uintptr_t>(activations.data) % kVectorBytes == 0) && ...);
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

}  // namespace fastbn::cuda
