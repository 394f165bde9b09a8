// SPDX-License-Identifier: BSD-3-Clause
//
// What the planner is asked: an operation, as far as plans depend on it, and the activations that
// it moves. This is the one place that knows the latter; everything else that is said of bytes
// (plans, their floor, predicted times) is derived from it.
#pragma once

#include <cstdint>
#include <tuple>

#include "../../core/problem.h"
#include "../geometry.h"

namespace fastbn::cuda {

enum class Operation : int8_t { kForward, kEval, kBackward };

struct Request {
  Operation operation = Operation::kForward;
  Problem problem;
  Steps steps = Steps::kAll;
  EpilogueKind epilogue = EpilogueKind::kNone;  // of all steps at once
  bool writes_mask = false;                     // forward, with a residual
  bool aligned = true;  // all activations begin at multiples of kVectorBytes
  // Forward: momentum is 1 / num_batches_tracked.
  bool cumulative = false;
  // Backward.
  bool training = true;
  bool want_dx = true;
  bool want_dresidual = false;  // with an epilogue
  bool want_dweight = true;
  bool want_dbias = true;
  // That a grid leaves to kernels of other streams.
  int free_multiprocessors = 0;

  // Requests with equal keys have equal plans.
  auto key() const {
    return std::make_tuple(operation, problem.dtype, problem.layout, problem.batch,
                           problem.channels, problem.spatial, steps, epilogue, writes_mask, aligned,
                           cumulative, training, want_dx, want_dresidual, want_dweight, want_dbias,
                           free_multiprocessors);
  }

  // Whether backward computes the pre-activation again.
  bool has_shift() const { return operation == Operation::kBackward && computes_z(epilogue); }
};

// The request for an operation.
Request request(const TrainingForward& op);
Request request(const EvalForward& op);
Request request(const Backward& op);

// What follows batch norm, as modules ask for it: a mask is kept wherever there can be one, and
// then activations begin with a vector; backward of a sum without a function has no epilogue.
void set_epilogue(Request& request, ActivationFunction function, bool residual);

struct Traffic {
  int reduce_reads = 0;  // activations that the first pass reads; 0 if there is no first pass
  int apply_reads = 0;   // those of the second
  int writes = 0;        // activations written, by both together
  // What a persistent kernel reads and writes once more of rows that find no room.
  int again_reads = 0;
  int again_writes = 0;
  int mask_reads = 0;  // passes that read a mask; persistent kernels read it once
  int mask_writes = 0;

  bool has_both_passes() const { return reduce_reads > 0 && apply_reads > 0; }
  int passes() const { return (reduce_reads > 0) + (apply_reads > 0); }
  // Masks that are read or written at all.
  int masks() const { return mask_reads > 0 || mask_writes > 0; }
  // Activations that are read at all, once or twice.
  int inputs() const { return reduce_reads > apply_reads ? reduce_reads : apply_reads; }
};

Traffic traffic_of(const Request& request);

// Bytes of one activation.
int64_t tensor_bytes(const Problem& problem);

}  // namespace fastbn::cuda
