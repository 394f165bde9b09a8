// SPDX-License-Identifier: BSD-3-Clause
#include "request.h"

#include "../../core/mask.h"

namespace fastbn::cuda {

namespace {

template <typename... Activations>
bool all_aligned(const Activations&... activations) {
  return ((reinterpret_cast<uintptr_t>(activations.data) % kVectorBytes == 0) && ...);
}

EpilogueKind kind_of(const Epilogue& epilogue, bool reads_residual) {
  if (epilogue.is_empty()) return EpilogueKind::kNone;
  if (epilogue.mask != nullptr) return EpilogueKind::kMask;
  return reads_residual ? EpilogueKind::kResidual : EpilogueKind::kActivation;
}

// Of backward with an epilogue. The first pass writes the gradient of the residual; where it does,
// the second reads that instead of dy and the residual or mask.
Traffic backward_epilogue_traffic(const Request& request) {
  if (!request.want_dx && !request.want_dresidual && !request.want_dweight && !request.want_dbias) {
    return {};
  }
  const int inputs = /*dy and x*/ 2 + (request.epilogue == EpilogueKind::kResidual);
  const int masks = request.epilogue == EpilogueKind::kMask;
  Traffic traffic{inputs, 0, request.want_dx + request.want_dresidual};
  traffic.mask_reads = masks;
  if (!request.training || !request.want_dx) return traffic;
  traffic.apply_reads = request.want_dresidual ? /*dresidual and x*/ 2 : inputs;
  if (!request.want_dresidual) traffic.mask_reads += masks;
  // The gradient of the pre-activation, in the place of dx unless it is wanted, and x.
  traffic.again_reads = 2;
  traffic.again_writes = !request.want_dresidual;
  return traffic;
}

Traffic backward_traffic(const Request& request) {
  if (request.epilogue != EpilogueKind::kNone) return backward_epilogue_traffic(request);
  // A row of partial results has both sums, whatever else is wanted.
  const bool want_sums =
      request.want_dweight || request.want_dbias || request.steps == Steps::kReduce;
  if (request.training && request.want_dx) {
    return {/*dy and x*/ 2, /*dy and x*/ 2, /*dx*/ 1, /*dy and x*/ 2};
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
  request.epilogue = kind_of(op.epilogue, op.epilogue.residual.data != nullptr);
  request.writes_mask = op.epilogue.mask_out != nullptr;
  request.aligned = all_aligned(op.x, op.y, op.epilogue.residual);
  request.cumulative = op.running.cumulative;
  return request;
}

Request request(const EvalForward& op) {
  Request request;
  request.operation = Operation::kEval;
  request.problem = op.problem;
  request.epilogue = kind_of(op.epilogue, op.epilogue.residual.data != nullptr);
  request.writes_mask = op.epilogue.mask_out != nullptr;
  request.aligned = all_aligned(op.x, op.y, op.epilogue.residual);
  return request;
}

Request request(const Backward& op) {
  Request request;
  request.operation = Operation::kBackward;
  request.problem = op.problem;
  request.steps = op.steps;
  const bool reads_residual =
      op.epilogue.residual.data != nullptr && op.epilogue.function != ActivationFunction::kIdentity;
  request.epilogue = kind_of(op.epilogue, reads_residual);
  request.aligned = all_aligned(op.dy, op.x, op.dx, op.dresidual, op.epilogue.residual);
  request.training = op.training;
  request.want_dx = op.dx.data != nullptr;
  request.want_dresidual = op.dresidual.data != nullptr;
  request.want_dweight = op.dweight.data != nullptr;
  request.want_dbias = op.dbias.data != nullptr;
  return request;
}

void set_epilogue(Request& request, ActivationFunction function, bool residual) {
  const bool backward = request.operation == Operation::kBackward;
  const bool identity = function == ActivationFunction::kIdentity;
  if (identity && (backward || !residual)) return;
  const bool has_mask = residual && has_two_slopes(function) && mask_bytes(request.problem) > 0;
  request.epilogue = residual ? EpilogueKind::kResidual : EpilogueKind::kActivation;
  if (backward && has_mask) request.epilogue = EpilogueKind::kMask;
  request.writes_mask = request.operation == Operation::kForward && has_mask;
  request.want_dresidual = backward && residual;
  if (request.writes_mask || request.epilogue == EpilogueKind::kMask) request.aligned = true;
}

Traffic traffic_of(const Request& request) {
  const int residual = request.epilogue == EpilogueKind::kResidual;
  Traffic traffic;
  switch (request.operation) {
    case Operation::kForward:
      traffic = {/*x*/ 1, /*x*/ 1 + residual, /*y*/ 1, /*x*/ 1};
      break;
    case Operation::kEval:
      traffic = {0, /*x*/ 1 + residual, /*y*/ 1};
      break;
    case Operation::kBackward:
      traffic = backward_traffic(request);
      break;
  }
  traffic.mask_writes = request.writes_mask;
  if (request.steps == Steps::kReduce) traffic.apply_reads = traffic.writes = 0;
  if (request.steps == Steps::kApply) traffic.reduce_reads = 0;
  return traffic;
}

int64_t tensor_bytes(const Problem& problem) {
  return problem.per_channel() * problem.channels * element_size(problem.dtype);
}

}  // namespace fastbn::cuda
