// SPDX-License-Identifier: BSD-3-Clause
//
// The four dtypes by definition: conversions of the 16-bit ones in double, slow and independent of
// those under test.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "../../csrc/core/dtype.h"

namespace fastbn::cpuloops {

// A binary format of IEEE 754 in 16 bits.
template <int kExponentBits, int kFractionBits>
struct Format16 {
  static constexpr int kMinExponent = 2 - (1 << (kExponentBits - 1));  // of normal numbers
  static constexpr uint16_t kInfinity = ((1 << kExponentBits) - 1) << kFractionBits;
  static constexpr uint16_t kOne = 1 << kFractionBits;  // of the exponent; also the hidden bit

  static double decode(uint16_t bits) {
    const double sign = bits & 0x8000 ? -1.0 : 1.0;
    const int exponent = (bits & kInfinity) >> kFractionBits;
    const int fraction = bits & (kOne - 1);
    if ((bits & kInfinity) == kInfinity) {
      return fraction != 0 ? std::numeric_limits<double>::quiet_NaN()
                           : sign * std::numeric_limits<double>::infinity();
    }
    const int significand = exponent == 0 ? fraction : kOne + fraction;
    const int power = exponent == 0 ? kMinExponent : kMinExponent + exponent - 1;
    return sign * std::ldexp(significand, power - kFractionBits);
  }

  // Rounds to nearest, ties to even.
  static uint16_t encode(double value) {
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    if (std::isnan(value)) return sign | kInfinity | (kOne >> 1);
    if (std::isinf(value)) return sign | kInfinity;
    if (value == 0) return sign;
    int exponent;
    std::frexp(value, &exponent);  // |value| < 2^exponent
    const int power = exponent - 1 < kMinExponent ? kMinExponent : exponent - 1;
    const double significand =
        std::nearbyint(std::ldexp(std::fabs(value), kFractionBits - power));  // at most 2 * kOne
    // That of a normal number has the hidden bit, which counts as one of the exponent.
    const double bits = significand + static_cast<double>(power - kMinExponent) * kOne;
    return sign | (bits >= kInfinity ? kInfinity : static_cast<uint16_t>(bits));
  }
};

template <typename scalar_t>
struct Type;

template <typename scalar_t>
struct NativeType {
  static constexpr double kRoundoff = std::numeric_limits<scalar_t>::epsilon() / 2;
  static constexpr double kSmallest = std::numeric_limits<scalar_t>::denorm_min();
  static double decode(scalar_t value) { return value; }
  static scalar_t encode(double value) { return static_cast<scalar_t>(value); }
};

template <>
struct Type<double> : NativeType<double> {
  static constexpr DType kDType = DType::kFloat64;
  static constexpr const char* kName = "float64";
};

template <>
struct Type<float> : NativeType<float> {
  static constexpr DType kDType = DType::kFloat32;
  static constexpr const char* kName = "float32";
};

template <>
struct Type<BFloat16> {
  using Format = Format16<8, 7>;
  static constexpr DType kDType = DType::kBFloat16;
  static constexpr const char* kName = "bfloat16";
  static constexpr double kRoundoff = 0x1p-8;
  static constexpr double kSmallest = 0x1p-133;
  static double decode(BFloat16 value) { return Format::decode(value.bits); }
  static BFloat16 encode(double value) { return {Format::encode(value)}; }
};

template <>
struct Type<Float16> {
  using Format = Format16<5, 10>;
  static constexpr DType kDType = DType::kFloat16;
  static constexpr const char* kName = "float16";
  static constexpr double kRoundoff = 0x1p-11;
  static constexpr double kSmallest = 0x1p-24;
  static double decode(Float16 value) { return Format::decode(value.bits); }
  static Float16 encode(double value) { return {Format::encode(value)}; }
};

}  // namespace fastbn::cpuloops
