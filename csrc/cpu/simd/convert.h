// SPDX-License-Identifier: BSD-3-Clause
//
// 16-bit floating point to and from float32 by integer arithmetic, for one value or for a vector of
// them: `U32` and `F32` are uint32_t and float, or compiler vectors of the two. Part of vectors.h.
#pragma once

#include <cstdint>

namespace fastbn::cpu::FASTBN_CAPABILITY {

template <typename To, typename From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <typename F32, typename U32>
inline F32 bfloat16_to_float(U32 half) {
  return bit_cast<F32>(half << 16);
}

// The upper halves are the result, rounded to nearest even. A NaN must have zeros in the half that
// is cut off, or rounding may carry out of it: NaNs widened from 16-bit values have, and the
// processor's own.
template <typename U32, typename F32>
inline U32 round_to_bfloat16(F32 value) {
  const U32 bits = bit_cast<U32>(value);
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

template <typename U32, typename F32>
inline U32 float_to_bfloat16(F32 value) {
  return round_to_bfloat16<U32>(value) >> 16;
}

template <typename F32, typename U32>
inline F32 float16_to_float(U32 half) {
  const U32 sign = (half & 0x8000u) << 16;
  const U32 magnitude = (half & 0x7fffu) << 13;
  // Multiplying by 2^112 moves the exponent's bias from 15 to 127 and normalizes subnormals.
  const F32 scaled = bit_cast<F32>(magnitude) * 0x1p112f;
  const U32 finite = bit_cast<U32>(scaled);
  const U32 inf_or_nan = magnitude | 0x7f800000u;
  const U32 bits = magnitude >= (0x7c00u << 13) ? inf_or_nan : finite;
  return bit_cast<F32>(bits | sign);
}

// Rounds to nearest even, overflows to infinity, keeps subnormals.
template <typename U32, typename F32>
inline U32 float_to_float16(F32 value) {
  const U32 bits = bit_cast<U32>(value);
  const U32 sign = (bits >> 16) & 0x8000u;
  const U32 magnitude = bits & 0x7fffffffu;
  const U32 inf_or_nan = magnitude > 0x7f800000u ? (magnitude ^ magnitude) + 0x7e00u
                                                 : (magnitude ^ magnitude) + 0x7c00u;
  // Adding 0.5 leaves the subnormal's rounded bits at the bottom of the significand.
  const U32 subnormal = bit_cast<U32>(bit_cast<F32>(magnitude) + 0.5f) - 0x3f000000u;
  const U32 normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const U32 finite = magnitude < (113u << 23) ? subnormal : normal;
  return (magnitude >= (143u << 23) ? inf_or_nan : finite) | sign;
}

}  // namespace fastbn::cpu::FASTBN_CAPABILITY
