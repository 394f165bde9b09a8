// SPDX-License-Identifier: BSD-3-Clause
//
// The conversions between float and the 16-bit types, against their definition.
#include <cmath>
#include <limits>

#include "selftest.h"

namespace fastbn::selftest {
namespace {

constexpr int kPatterns = 1 << 16;

// A format of 1 sign bit, then the exponent, then the fraction.
struct Format {
  int fraction_bits;
  int bias;
};
constexpr Format kBFloat16Format = {7, 127};
constexpr Format kFloat16Format = {10, 15};

// What a bit pattern means, by the definition of IEEE 754.
double meaning(const Format& format, uint16_t bits) {
  const int exponent = (bits & 0x7FFF) >> format.fraction_bits;
  const int fraction = bits & ((1 << format.fraction_bits) - 1);
  const int largest = 2 * format.bias + 1;
  double magnitude = 0;
  if (exponent == largest) {
    magnitude = fraction == 0 ? INFINITY : NAN;
  } else if (exponent == 0) {
    magnitude = std::ldexp(fraction, 1 - format.bias - format.fraction_bits);
  } else {
    magnitude = std::ldexp(fraction + (1 << format.fraction_bits),
                           exponent - format.bias - format.fraction_bits);
  }
  return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

template <typename T>
uint16_t narrowed(float value) {
  const float from[1] = {value};
  T to[1];
  gpu::narrow(from, to);
  return to[0].bits;
}

template <typename T>
bool widens(const Format& format) {
  bool right = true;
  for (int bits = 0; bits < kPatterns; ++bits) {
    const double expected = meaning(format, static_cast<uint16_t>(bits));
    const float value = gpu::widen(T{static_cast<uint16_t>(bits)});
    right &= std::isnan(expected) ? std::isnan(value)
                                  : static_cast<double>(value) == expected &&
                                        std::signbit(value) == std::signbit(expected);
  }
  return right;
}

template <typename T>
bool returns(const Format& format) {
  bool right = true;
  for (int bits = 0; bits < kPatterns; ++bits) {
    const bool is_nan = std::isnan(meaning(format, static_cast<uint16_t>(bits)));
    const uint16_t back = narrowed<T>(gpu::widen(T{static_cast<uint16_t>(bits)}));
    right &= back == (is_nan ? 0x7FFF : bits);
  }
  return right;
}

// Between each two neighbours: their midpoint goes to the even one, and a float to either side of
// it to the nearer one. The neighbour of the largest number is the power of two that would follow.
template <typename T>
bool rounds(const Format& format) {
  const auto infinity = static_cast<uint16_t>((2 * format.bias + 1) << format.fraction_bits);
  bool right = true;
  for (uint16_t low = 0; low < infinity; ++low) {
    const auto high = static_cast<uint16_t>(low + 1);
    const double above =
        high == infinity ? std::ldexp(1.0, format.bias + 1) : meaning(format, high);
    const auto midpoint = static_cast<float>((meaning(format, low) + above) / 2);
    const uint16_t even = low % 2 == 0 ? low : high;
    right &= narrowed<T>(midpoint) == even;
    right &= narrowed<T>(std::nextafter(midpoint, 0.0f)) == low;
    right &= narrowed<T>(std::nextafter(midpoint, INFINITY)) == high;
    right &= narrowed<T>(-midpoint) == (0x8000 | even);
  }
  return right && narrowed<T>(INFINITY) == infinity &&
         narrowed<T>(std::numeric_limits<float>::max()) == infinity;
}

}  // namespace

void test_numbers() {
  check("bfloat16 widens every pattern", widens<BFloat16>(kBFloat16Format));
  check("float16 widens every pattern", widens<Float16>(kFloat16Format));
  check("bfloat16 comes back from float for every pattern", returns<BFloat16>(kBFloat16Format));
  check("float16 comes back from float for every pattern", returns<Float16>(kFloat16Format));
  check("bfloat16 rounds to nearest even everywhere", rounds<BFloat16>(kBFloat16Format));
  check("float16 rounds to nearest even everywhere", rounds<Float16>(kFloat16Format));
}

}  // namespace fastbn::selftest
