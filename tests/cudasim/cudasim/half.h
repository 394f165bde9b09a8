// SPDX-License-Identifier: BSD-3-Clause
//
// The machine's conversions between float and the 16-bit types: to nearest, ties to even, any NaN
// to the one of all magnitude bits.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastbn::cudasim {

constexpr uint16_t kNan16 = 0x7FFF;

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float float_from_bfloat16(uint16_t bits) {
  return float_from_bits(static_cast<uint32_t>(bits) << 16);
}

inline uint16_t bfloat16_from_float(float value) {
  if (value != value) return kNan16;
  const uint32_t bits = float_bits(value);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline float float_from_float16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7FFF);
  if (magnitude >= 0x7C00) return float_from_bits(sign | 0x7F800000 | (magnitude & 0x3FF) << 13);
  if (magnitude >= 0x0400) return float_from_bits(sign | ((magnitude << 13) + (112u << 23)));
  const float tiny = static_cast<float>(magnitude) * 0x1p-24f;
  return float_from_bits(sign | float_bits(tiny));
}

inline uint16_t float16_from_float(float value) {
  if (value != value) return kNan16;
  const uint32_t bits = float_bits(value);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7FFFFFFF;
  if (magnitude >= 0x47800000) return sign | 0x7C00;  // 65536 and above
  if (magnitude < 0x38800000) {
    // Below 2^-14: the sum's last bit is 2^-24, so the adder rounds where float16 does.
    const float shifted = float_from_bits(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (float_bits(shifted) - 0x3F000000));
  }
  const uint32_t rounded = magnitude + 0x0FFF + (magnitude >> 13 & 1) - (112u << 23);
  return static_cast<uint16_t>(sign | rounded >> 13);
}

}  // namespace fastbn::cudasim
