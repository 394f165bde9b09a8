// SPDX-License-Identifier: BSD-3-Clause
//
// The dtypes of activations and of values per channel.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace fastbn {

enum class DType : int8_t { kFloat64, kFloat32, kBFloat16, kFloat16 };

// Storage of the 16-bit types; arithmetic happens in float.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

FASTBN_HOST_DEVICE constexpr int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    default:
      return 2;
  }
}

// The dtype of sums and saved statistics: float64 for float64, float32 for everything else.
constexpr DType accumulate_dtype(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

// accumulate_dtype() of types; called acc_t where it is used.
template <typename scalar_t>
struct AccumulateType {
  using type = float;
};
template <>
struct AccumulateType<double> {
  using type = double;
};
template <typename scalar_t>
using acc_type = typename AccumulateType<scalar_t>::type;

}  // namespace fastbn
