// SPDX-License-Identifier: BSD-3-Clause
//
// Masks: which of the two values that the derivative of some activation functions can take it takes
// at each element. Forward writes one, so that backward needs to read no residual.
//
// A mask has a byte for each 16 bytes of x, in order of memory, with a bit for each element of
// these, the first the lowest, and zeros above: whoever has a whole vector has a byte of its own.
// The bit is set where the derivative is 1, at what the dtype of x holds of the pre-activation.
#pragma once

#include <cstdint>

#include "activation_table.h"
#include "host_device.h"
#include "problem.h"

namespace fastbn {

constexpr int kMaskedBytes = 16;  // of x, that a byte of a mask is for

// Elements that a byte is for.
FASTBN_HOST_DEVICE constexpr int64_t masked_elements(DType dtype) {
  return kMaskedBytes / element_size(dtype);
}

// Far fewer bytes than vectors are numbered by, and more than any activation should have.
constexpr int64_t kMaxMaskBytes = int64_t{1} << 29;

// Functions with two derivatives: 1, and the one that is told by other_slope().
FASTBN_HOST_DEVICE constexpr bool has_two_slopes(ActivationFunction function) {
  return function == ActivationFunction::kRelu || function == ActivationFunction::kRelu6 ||
         function == ActivationFunction::kLeakyRelu;
}

FASTBN_HOST_DEVICE constexpr double other_slope(ActivationFunction function, double parameter) {
  return function == ActivationFunction::kLeakyRelu ? parameter : 0;
}

// The bytes of a mask for x; 0 where it cannot have one, as its elements do not come in whole
// vectors of a channel or of a row.
inline int64_t mask_bytes(const Problem& problem) {
  if (problem.layout == Layout::kGeneric) return 0;
  const int64_t row = problem.layout == Layout::kContiguous ? problem.spatial : problem.channels;
  const int64_t together = masked_elements(problem.dtype);
  const int64_t bytes = problem.per_channel() * problem.channels / together;
  return row % together == 0 && bytes <= kMaxMaskBytes ? bytes : 0;
}

}  // namespace fastbn
