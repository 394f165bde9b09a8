// SPDX-License-Identifier: BSD-3-Clause
#include "request.h"

#include <initializer_list>

namespace fastbn::cuda {

namespace {

Request request(Operation operation, const Problem& problem,
                std::initializer_list<const Activation*> activations) {
  Request request;
  request.operation = operation;
  request.problem = problem;
  for (const Activation* activation : activations) {
    const auto address = reinterpret_cast<uintptr_t>(activation->data);
    if (address % kVectorBytes != 0) request.aligned = false;
  }
  return request;
}

}  // namespace

Request request(const TrainingForward& op) {
  Request forward = request(Operation::kForward, op.problem, {&op.x, &op.y});
  forward.cumulative = op.cumulative;
  return forward;
}

Request request(const InferenceForward& op) {
  return request(Operation::kInference, op.problem, {&op.x, &op.y});
}

Request request(const Backward& op) {
  Request backward = request(Operation::kBackward, op.problem, {&op.dy, &op.x, &op.dx});
  backward.training = op.training;
  backward.want_dx = op.dx.data != nullptr;
  backward.want_sums = op.dweight.data != nullptr || op.dbias.data != nullptr;
  return backward;
}

}  // namespace fastbn::cuda
