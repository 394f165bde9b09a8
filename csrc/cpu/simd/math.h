// SPDX-License-Identifier: BSD-3-Clause
//
// Functions of vectors: the Math of core/activation_functions.h. Part of loops_impl.h.
#pragma once

#include <iterator>

#include "vectors.h"

namespace fastbn::cpu::FASTBN_CAPABILITY {

// What the functions know of a type: how its numbers are put together, beyond which z exp(z) is
// infinite or nothing is left of it, and the coefficients of series.
//
// kErfc is of (1 + 2x) * exp(x^2) * erfc(x) for x >= 0, in powers of (x - 3.75) / (x + 3.75): the
// series of Chebyshev polynomials of Shepherd and Laframboise, "Chebyshev approximation of (1 + 2x)
// exp(x^2) erfc x in 0 <= x < infinity", 1981, computed anew to 40 digits.
template <typename acc_t>
struct MathOf;

template <>
struct MathOf<float> {
  static constexpr int kMantissaBits = 23;
  static constexpr int kBias = 127;
  static constexpr double kRoundingShift = 0x1.8p23;
  static constexpr double kLowest = -88, kHighest = 89;
  static constexpr double kLogTwoHigh = 0x1.62e4p-1, kLogTwoLow = 0x1.7f7d1cf79abcap-20;
  static constexpr double kExp[] = {1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040};
  static constexpr double kErfc[] = {1.23751261927,    -0.140240658321,   0.00358627039402,
                                     0.0822784199835,  -0.108814270149,   0.0922907695913,
                                     -0.0586468587355, 0.0284092523641,   -0.0098444948597,
                                     0.00167591221798, 0.000396307612989, -0.000224116746744};
};

template <>
struct MathOf<double> {
  static constexpr int kMantissaBits = 52;
  static constexpr int kBias = 1023;
  static constexpr double kRoundingShift = 0x1.8p52;
  static constexpr double kLowest = -709, kHighest = 710;
  static constexpr double kLogTwoHigh = 0x1.62e42feep-1, kLogTwoLow = 0x1.a39ef35793c76p-33;
  static constexpr double kExp[] = {
      1.0 / 2,     1.0 / 6,      1.0 / 24,      1.0 / 120,      1.0 / 720,       1.0 / 5040,
      1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
  static constexpr double kErfc[] = {
      1.23751263083782758,      -0.140240598585547018,    0.00358541548546442937,
      0.082276738490151024,     -0.108803930141748857,    0.0923043211601983343,
      -0.0586933985896367741,   0.0283622774215155971,    -0.00974657955802927553,
      0.00175562583242175281,   0.00029371366559134482,   -0.00029015397928986766,
      0.0000516490988926824035, 0.0000223839120365506793, -0.0000114441462377005234,
      -9.72849582211122395e-7,  1.75163764884906213e-6,   -5.82628107880072566e-8,
      -2.58668507161558827e-7,  2.42897629254882276e-8,   3.86753342422223269e-8,
      -4.38928415998604357e-9,  -5.17399021401129406e-9,  5.45715730470371384e-10,
      4.25147144479635746e-10,  -3.75315827795815953e-11};
};

template <typename acc_t>
struct VectorMath {
  using Value = Vector<acc_t>;

  static Value number(double value) { return splat(static_cast<acc_t>(value)); }

  static Value exp(Value z) {
    const Power power(z);
    return (number(1) + power.expm1_of_rest) * power.of_two;
  }

  // Exact to the last digits near zero, too.
  static Value expm1(Value z) {
    const Power power(z);
    return power.of_two * power.expm1_of_rest + (power.of_two - number(1));
  }

  // The share of the normal distribution below z, exact to the last digits where that is little;
  // `gaussian` is exp(-z * z / 2).
  static Value normal_cdf(Value z, Value gaussian) {
    const Value zero = number(0), one = number(1), most = number(40);
    Value x = (z > zero ? z : -z) * number(0.70710678118654752440);
    x = x > most ? most : x;
    const Value shifted = x + number(3.75), doubled = one + number(2) * x;
    const Value inverse = one / (shifted * doubled);
    const Value t = (x - number(3.75)) * doubled * inverse;
    const Value above = number(0.5) * gaussian * series(Traits::kErfc, t) * (shifted * inverse);
    const Value below = one - above;
    return z > zero ? below : above;
  }

 private:
  using Traits = MathOf<acc_t>;
  using Bits = Vector<typename BitsOf<acc_t>::type>;

  // exp(z) = 2^n * exp(rest)
  struct Power {
    explicit Power(Value z) {
      const Value lowest = number(Traits::kLowest), highest = number(Traits::kHighest);
      z = z < lowest ? lowest : z;
      z = z > highest ? highest : z;
      // Adding so large a number leaves no digits behind the point, and n in the last bits.
      const Value shift = number(Traits::kRoundingShift);
      const Value shifted = z * number(1.4426950408889634074) + shift;
      const Value n = shifted - shift;
      constexpr auto kOne = typename BitsOf<acc_t>::type{Traits::kBias} << Traits::kMantissaBits;
      of_two = bit_cast<Value>((bit_cast<Bits>(shifted) << Traits::kMantissaBits) + kOne);
      const Value rest = z - n * number(Traits::kLogTwoHigh) - n * number(Traits::kLogTwoLow);
      expm1_of_rest = rest + rest * rest * series(Traits::kExp, rest);
    }

    Value of_two, expm1_of_rest;
  };

  // coefficients[0] + coefficients[1] * z + ..., even and odd powers side by side.
  template <size_t kTerms>
  static Value series(const double (&coefficients)[kTerms], Value z) {
    static_assert(kTerms % 2 == 0);
    const Value square = z * z;
    Value even = number(coefficients[kTerms - 2]), odd = number(coefficients[kTerms - 1]);
#pragma GCC unroll 16
    for (int i = static_cast<int>(kTerms) - 4; i >= 0; i -= 2) {
      even = even * square + number(coefficients[i]);
      odd = odd * square + number(coefficients[i + 1]);
    }
    return even + odd * z;
  }
};

}  // namespace fastbn::cpu::FASTBN_CAPABILITY
