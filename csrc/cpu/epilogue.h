// SPDX-License-Identifier: BSD-3-Clause
//
// What follows batch norm, as the orders of memory need it. dz is the gradient of the
// pre-activation: dy where there is no epilogue, and what a residual gets as its gradient.
#pragma once

#include <cstdint>

#include "../core/activation_functions.h"
#include "../core/mask.h"
#include "../core/problem.h"
#include "channel.h"
#include "simd/loops.h"
#include "strided_access.h"

namespace fastbn::cpu {

// Where the reduction of gradients leaves dz: in the residual's gradient; without that in dx, which
// then takes its place; nowhere where that would cost more than to compute it again.
inline OutputActivation kept_dz(const Backward& op) {
  if (op.epilogue.is_empty()) return {};
  if (op.dresidual.data != nullptr) return op.dresidual;
  const bool is_cheap =
      op.epilogue.function == ActivationFunction::kRelu && op.epilogue.mask == nullptr;
  return is_cheap ? OutputActivation{} : op.dx;
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

// A mask by elements, counted in order of memory, where they come one by one.
class MaskElements {
 public:
  MaskElements(const Problem& problem, const Epilogue& epilogue)
      : dtype_(problem.dtype),
        epilogue_(epilogue),
        other_slope_(round_to_sums(dtype_, other_slope(epilogue.function, epilogue.parameter))) {}

  // Threads may write bits of one byte.
  void put(int64_t element, double z) const {
    uint8_t* byte = epilogue_.mask_out + element / masked_elements(dtype_);
    const int all = (1 << masked_elements(dtype_)) - 1;
    __atomic_fetch_and(byte, static_cast<uint8_t>(all & ~bit_of(element)), __ATOMIC_RELAXED);
    if (has_slope_one(epilogue_.function, held(z), 0.0, 6.0)) {
      __atomic_fetch_or(byte, bit_of(element), __ATOMIC_RELAXED);
    }
  }

  double gradient(int64_t element, double dy) const {
    if (epilogue_.mask[element / masked_elements(dtype_)] & bit_of(element)) return dy;
    return other_slope_ == 0 ? 0 : round_to_sums(dtype_, dy * other_slope_);
  }

 private:
  uint8_t bit_of(int64_t element) const {
    return static_cast<uint8_t>(1 << element % masked_elements(dtype_));
  }
  // As activations hold it.
  double held(double z) const {
    double storage;
    write({&storage, dtype_, 1}, 0, z);
    return read({&storage, dtype_, 1}, 0);
  }

  const DType dtype_;
  const Epilogue& epilogue_;
  const double other_slope_;
};

// An epilogue whose residual is contiguous or generic.
class EpilogueOperand {
 public:
  // `like` lies as a mask does.
  EpilogueOperand(const Problem& problem, const Epilogue& epilogue, const InputActivation& like)
      : problem_(problem),
        epilogue_(epilogue),
        residual_(problem, epilogue.residual),
        like_(problem, like),
        mask_(problem, epilogue) {}

  bool is_empty() const { return epilogue_.is_empty(); }

  // For the loops over a block; valid as long as scratch.
  EpilogueLoop read(int64_t channel, const ChannelBlock& block, Scratch& scratch) const {
    EpilogueLoop loop{epilogue_.function, epilogue_.parameter, problem_.dtype};
    if (epilogue_.residual.data != nullptr) loop.residual = residual_.read(channel, block, scratch);
    if (problem_.layout != Layout::kContiguous) return loop;
    const int64_t first = (block.sample * problem_.channels + channel) * problem_.spatial;
    const int64_t byte = (first + block.position) / masked_elements(problem_.dtype);
    if (epilogue_.mask_out != nullptr) loop.mask_out = epilogue_.mask_out + byte;
    if (epilogue_.mask != nullptr) loop.mask = epilogue_.mask + byte;
    return loop;
  }

  // Whether a mask lies in another order than the elements of a block, and does not go to loops.
  bool writes_mask_apart() const {
    return epilogue_.mask_out != nullptr && problem_.layout != Layout::kContiguous;
  }
  bool reads_mask_apart() const {
    return epilogue_.mask != nullptr && problem_.layout != Layout::kContiguous;
  }
  // Such masks, of a block of pre-activations, and to a block of dy.
  void put_mask(int64_t channel, const ChannelBlock& block, Scratch& z) const {
    const InputVector values{z.data(), accumulate_dtype(problem_.dtype), 1};
    like_.for_each_element(channel, block, [&](int64_t element, int64_t i) {
      mask_.put(element, cpu::read(values, i));
    });
  }
  void mask_gradient(int64_t channel, const ChannelBlock& block, Scratch& dy) const {
    const OutputVector values{dy.data(), accumulate_dtype(problem_.dtype), 1};
    like_.for_each_element(channel, block, [&](int64_t element, int64_t i) {
      write(values, i, mask_.gradient(element, cpu::read(values, i)));
    });
  }

 private:
  const Problem& problem_;
  const Epilogue& epilogue_;
  Operand<const void> residual_, like_;
  MaskElements mask_;
};

}  // namespace fastbn::cpu
