// SPDX-License-Identifier: BSD-3-Clause
//
// What follows batch norm, as the orders of memory need it. dz is the gradient of the
// pre-activation: dy where there is no epilogue, and what a residual gets as its gradient.
#pragma once

#include <cstdint>

#include "../core/problem.h"
#include "simd/loops.h"
#include "strided_access.h"

namespace fastbn::cpu {

// Where the reduction of gradients leaves dz: in the residual's gradient; without that in dx, which
// then takes its place; nowhere where that would cost more than to compute it again.
inline OutputActivation kept_dz(const Backward& op) {
  if (op.epilogue.is_empty()) return {};
  if (op.dresidual.data != nullptr) return op.dresidual;
  return op.epilogue.function == ActivationFunction::kRelu ? OutputActivation{} : op.dx;
}

// Whether dz is in memory once gradients are reduced.
inline bool has_dz(const Backward& op) {
  return op.epilogue.is_empty() || kept_dz(op).data != nullptr;
}

// It, or else dy.
inline InputActivation dz_or_dy(const Backward& op) {
  const OutputActivation kept = kept_dz(op);
  return kept.data == nullptr ? op.dy : InputActivation(kept);
}

// Whether dx is written where dz is.
inline bool is_in_place(const Backward& op) {
  return op.dx.data != nullptr && kept_dz(op).data == op.dx.data;
}

// An epilogue whose residual is contiguous or generic.
class EpilogueOperand {
 public:
  EpilogueOperand(const Problem& problem, const Epilogue& epilogue)
      : epilogue_(epilogue), dtype_(problem.dtype), residual_(problem, epilogue.residual) {}

  bool is_empty() const { return epilogue_.is_empty(); }

  // For the loops over a block; valid as long as scratch.
  EpilogueLoop read(int64_t channel, const ChannelBlock& block, Scratch& scratch) const {
    const bool has_residual = epilogue_.residual.data != nullptr;
    return {epilogue_.function, epilogue_.parameter, dtype_,
            has_residual ? residual_.read(channel, block, scratch) : nullptr};
  }

 private:
  const Epilogue& epilogue_;
  DType dtype_;
  Operand<const void> residual_;
};

}  // namespace fastbn::cpu
