// SPDX-License-Identifier: BSD-3-Clause
//
// Which activations an operation moves: the one place that knows. Everything else that is said of
// bytes (plans, their floor, predicted times) is derived from it.
#pragma once

#include "types.h"

namespace fastbn::cuda {

struct Traffic {
  int reduce_reads = 0;  // activations that the first pass reads; 0 if there is no first pass
  int apply_reads = 0;   // those of the second
  int writes = 0;        // activations written, by either

  bool has_both_passes() const { return reduce_reads > 0 && apply_reads > 0; }
  int passes() const { return (reduce_reads > 0) + (apply_reads > 0); }
  // Activations that are read at all, once or twice.
  int inputs() const { return reduce_reads > apply_reads ? reduce_reads : apply_reads; }
};

Traffic traffic_of(const Request& request);

// Bytes of one activation.
int64_t tensor_bytes(const Problem& problem);

}  // namespace fastbn::cuda
