// SPDX-License-Identifier: BSD-3-Clause
//
// The loops that convert between an activation's dtype and acc_t: pack and unpack.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "buffer.h"
#include "cases.h"
#include "check.h"
#include "formats.h"
#include "tests.h"

namespace fastbn::cpuloops {

namespace {

std::vector<int64_t> lengths() {
  std::vector<int64_t> all;
  for (int64_t length = 1; length <= 4 * kMaxLanes + 3; ++length) all.push_back(length);
  all.push_back(1000);
  return all;
}

template <typename scalar_t>
void check_pack(Check& check, Buffer<scalar_t>& from, int64_t stride, int64_t length) {
  check.on(Type<scalar_t>::kName, {length, stride, 1}, "packed");
  Buffer<acc_type<scalar_t>> to(length, 3);
  loops_for<scalar_t>().pack(from.data(), stride, length, to.data());
  for (int64_t i = 0; i < length; ++i) {
    check.is_near(to[i], from[i * stride], 0, "element", i);
    check.is_true(std::signbit(to[i]) == std::signbit(from[i * stride]) || std::isnan(to[i]),
                  "sign of element", i);
  }
  check.is_true(to.front_untouched(), "what lies in front is untouched");
}

template <typename scalar_t>
void check_unpack(Check& check, Buffer<acc_type<scalar_t>>& from, int64_t stride) {
  const int64_t length = from.size();
  const Block2d rows{length, stride, 1};
  check.on(Type<scalar_t>::kName, rows, "unpacked");
  Buffer<scalar_t> to(extent(rows), 3);
  loops_for<scalar_t>().unpack(from.data(), to.data(), stride, length);
  check.is_true(to.front_untouched(), "what lies in front is untouched");
  for (int64_t i = 0; i < to.size(); ++i) {
    if (i % stride != 0) {
      check.is_true(to.untouched(i), "what lies between elements is untouched", i);
      continue;
    }
    // Rounded once, to nearest even: no tolerance.
    const double value = from[i / stride];
    const double expected = Type<scalar_t>::decode(Type<scalar_t>::encode(value));
    check.is_near(to[i], expected, 0, "element", i);
    check.is_true(std::signbit(to[i]) == std::signbit(value) || std::isnan(value),
                  "sign of element", i);
  }
}

// All 2^16 values of a 16-bit dtype.
template <typename scalar_t>
Buffer<scalar_t>& all_values(Buffer<scalar_t>& buffer) {
  for (int64_t bits = 0; bits < buffer.size(); ++bits) {
    buffer.data()[bits].bits = static_cast<uint16_t>(bits);
  }
  return buffer;
}
constexpr int64_t kValues = 1 << 16;

// For every value and the next one in magnitude: itself, the tie between them, and the floats about
// both. What lies behind the largest value rounds to it or to infinity.
template <typename scalar_t>
std::vector<float> floats_about_all_values() {
  std::vector<float> floats;
  for (int64_t bits = 0; bits < kValues; ++bits) {
    using Format = typename Type<scalar_t>::Format;
    const auto magnitude = static_cast<uint16_t>(bits & 0x7fff);
    if (magnitude >= Format::kInfinity) continue;
    const double value = Format::decode(static_cast<uint16_t>(bits));
    // The next one of the largest is where it would be if exponents went on.
    const double next = magnitude + 1 < Format::kInfinity
                            ? Format::decode(static_cast<uint16_t>(bits + 1))
                            : 2 * value - Format::decode(static_cast<uint16_t>(bits - 1));
    for (const double center : {value, (value + next) / 2}) {
      const auto near = static_cast<float>(center);
      floats.push_back(near);
      floats.push_back(std::nextafterf(near, 0));
      floats.push_back(std::nextafterf(near, std::copysign(INFINITY, near)));
    }
  }
  // Every power of two and a half of float. NaNs that the loops meet: widened ones and the
  // processors' own.
  for (int power = -149; power < 128; ++power) floats.push_back(std::ldexp(1.5f, power));
  for (const float special : {INFINITY, -INFINITY, NAN, -NAN}) floats.push_back(special);
  return floats;
}

template <typename scalar_t>
void test_pack(Check& check) {
  for (int64_t length : lengths()) {
    for (const int64_t stride : {0, 1, 2, 5}) {
      for (const int64_t front : {0, 1}) {
        Buffer<scalar_t> from((length - 1) * stride + 1, front);
        fill(from, 0, 1, length);
        check_pack(check, from, stride, length);
      }
    }
  }
  if constexpr (sizeof(scalar_t) == 2) {
    Buffer<scalar_t> from(kValues);
    check_pack(check, all_values(from), 1, kValues);
    check_pack(check, from, 3, kValues / 3);
  }
}

template <typename scalar_t>
void test_unpack(Check& check) {
  for (int64_t length : lengths()) {
    for (const int64_t stride : {1, 2, 5}) {
      Buffer<acc_type<scalar_t>> from(length, stride);
      fill(from, 0, 1, length);
      check_unpack<scalar_t>(check, from, stride);
    }
  }
  if constexpr (sizeof(scalar_t) == 2) {
    const std::vector<float> floats = floats_about_all_values<scalar_t>();
    Buffer<float> from(static_cast<int64_t>(floats.size()));
    std::copy(floats.begin(), floats.end(), from.data());
    check_unpack<scalar_t>(check, from, 1);

    // There and back again: the very bits, but those of NaNs.
    Buffer<scalar_t> all(kValues), back(kValues);
    Buffer<float> packed(kValues);
    check.on(Type<scalar_t>::kName, {1, kValues, kValues}, "all values");
    loops_for<scalar_t>().pack(all_values(all).data(), 1, kValues, packed.data());
    loops_for<scalar_t>().unpack(packed.data(), back.data(), 1, kValues);
    for (int64_t i = 0; i < kValues; ++i) {
      const bool same = back.data()[i].bits == all.data()[i].bits;
      check.is_true(std::isnan(all[i]) ? std::isnan(back[i]) : same, "element", i);
    }
  }
}

}  // namespace

bool conversions_pass() {
  const bool results[] = {
      passes("pack", [](Check& c, auto t) { test_pack<decltype(t)>(c); }),
      passes("unpack", [](Check& c, auto t) { test_unpack<decltype(t)>(c); }),
  };
  return all(results);
}

}  // namespace fastbn::cpuloops
