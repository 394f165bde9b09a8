// SPDX-License-Identifier: BSD-3-Clause
//
// Every function of struct Loops against its formula in double, for all dtypes, in the instruction
// set that FASTBN_CPU_CAPABILITY names; and disjoint(), what the loops demand of their
// callers. Prints that instruction set and a line per function; returns 1 where a check failed.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "../../csrc/core/problem.h"
#include "../../csrc/cpu/simd/loops.h"
#include "buffer.h"
#include "cases.h"
#include "check.h"
#include "formats.h"

namespace fastbn::cpuloops {

using cpu::AffineColumns;
using cpu::GradAffineColumns;
using cpu::Loops;

template <typename scalar_t>
constexpr double kAccRoundoff = Type<acc_type<scalar_t>>::kRoundoff;

template <typename scalar_t>
const Loops& loops_for() {
  return cpu::loops(Type<scalar_t>::kDType);
}

// Roundings that a sum of `count` terms in acc_t may have: they add up like a random walk, and
// those of every term come on top. For float64 the formula's own are among them.
double roundings(int64_t count) { return 8 + std::sqrt(static_cast<double>(count)); }

// ---- Sums ----

struct ExactMoments {
  double mean = 0;
  double m2 = 0;
};

ExactMoments moments_of(const std::vector<double>& values) {
  ExactMoments moments;
  // The second time for what the first has rounded off.
  for (int i = 0; i < 2; ++i) {
    double deviations = 0;
    for (double value : values) deviations += value - moments.mean;
    moments.mean += deviations / values.size();
  }
  for (double value : values) {
    moments.m2 += (value - moments.mean) * (value - moments.mean);
  }
  return moments;
}

// What the moments of values may err by. The pivot is a mean of few, or one rounded to acc_t, and
// at most two standard deviations away: five times m2 are summed.
template <typename scalar_t>
ExactMoments moments_tolerance(const ExactMoments& exact, int64_t count) {
  const double roundoff = kAccRoundoff<scalar_t> * roundings(count);
  const double pivot_error = 8 * kAccRoundoff<scalar_t> * std::fabs(exact.mean);
  const double sum_of_squares = 5 * exact.m2 + count * pivot_error * pivot_error;
  return {roundoff * std::sqrt(sum_of_squares / count) + 0x1p-51 * std::fabs(exact.mean),
          roundoff * sum_of_squares + count * pivot_error * pivot_error};
}

std::vector<Numbers> all_numbers() {
  return {Numbers::kSpread, Numbers::kOffset, Numbers::kTiny, Numbers::kConstant,
          Numbers::kOutliers};
}

template <typename scalar_t>
std::vector<double> values_of(const Buffer<scalar_t>& buffer, const Block2d& block) {
  std::vector<double> values;
  for (int64_t row = 0; row < block.rows; ++row) {
    for (int64_t column = 0; column < block.columns; ++column) {
      values.push_back(buffer[row * block.row_stride + column]);
    }
  }
  return values;
}

template <typename scalar_t>
std::vector<double> column_of(const Buffer<scalar_t>& buffer, const Block2d& block,
                              int64_t column) {
  std::vector<double> values;
  for (int64_t row = 0; row < block.rows; ++row) {
    values.push_back(buffer[row * block.row_stride + column]);
  }
  return values;
}

// Calls body(block, front, numbers).
template <typename Body>
void for_each_case(const std::vector<Block2d>& blocks, Body body) {
  for (const Block2d& block : blocks) {
    for (int64_t front : fronts_of(block)) {
      for (Numbers numbers : all_numbers()) body(block, front, numbers);
    }
  }
}

template <typename scalar_t>
void test_moments(Check& check) {
  for_each_case(reduced_blocks(), [&](const Block2d& block, int64_t front, Numbers numbers) {
    check.on(Type<scalar_t>::kName, block, name(numbers));
    Buffer<scalar_t> x(extent(block), front);
    fill(x, block, numbers, false, block.columns);
    const ExactMoments exact = moments_of(values_of(x, block));
    const auto tolerance = moments_tolerance<scalar_t>(exact, block.elements());
    double mean, m2;
    loops_for<scalar_t>().moments(x.data(), block, &mean, &m2);
    check.is_near(mean, exact.mean, tolerance.mean, "mean");
    check.is_near(m2, exact.m2, tolerance.m2, "m2");
    if (numbers == Numbers::kConstant) check.is_true(m2 == 0, "m2 of equal numbers is 0");

    strew_special(x, block);
    loops_for<scalar_t>().moments(x.data(), block, &mean, &m2);
    check.is_true(!std::isfinite(mean), "mean of infinities");
    check.is_true(std::isnan(m2), "m2 of infinities");
  });
}

template <typename scalar_t>
void test_column_moments(Check& check) {
  for_each_case(column_blocks(), [&](const Block2d& block, int64_t front, Numbers numbers) {
    check.on(Type<scalar_t>::kName, block, name(numbers));
    Buffer<scalar_t> x(extent(block), front);
    fill(x, block, numbers, true, block.columns + block.rows);
    std::vector<ExactMoments> columns;
    for (int64_t column = 0; column < block.columns; ++column) {
      columns.push_back(moments_of(column_of(x, block, column)));
    }
    for (const int64_t seen : {0, 7}) {
      Buffer<double> mean(block.columns), m2(block.columns);
      fill(mean, 0, seen == 0 ? 0 : 2, 1);
      fill(m2, seen, 0, 2);
      std::vector<ExactMoments> expected, tolerance;
      for (int64_t column = 0; column < block.columns; ++column) {
        const ExactMoments exact = moments_of(column_of(x, block, column));
        tolerance.push_back(moments_tolerance<scalar_t>(exact, block.rows));
        const double all = seen + block.rows;
        const double distance = exact.mean - mean[column];
        expected.push_back({mean[column] + distance * block.rows / all,
                            m2[column] + exact.m2 + distance * distance * seen * block.rows / all});
        // The error of the mean goes into the distance.
        tolerance.back().m2 += (2 * std::fabs(distance) + tolerance.back().mean) *
                                   tolerance.back().mean * seen * block.rows / all +
                               0x1p-50 * expected.back().m2;
        tolerance.back().mean += 0x1p-51 * std::fabs(mean[column]);
      }
      loops_for<scalar_t>().column_moments(x.data(), block, seen, mean.data(), m2.data());
      for (int64_t column = 0; column < block.columns; ++column) {
        check.is_near(mean[column], expected[column].mean, tolerance[column].mean, "mean", column);
        check.is_near(m2[column], expected[column].m2, tolerance[column].m2, "m2", column);
      }
    }
    Buffer<double> mean(block.columns), m2(block.columns);
    fill(mean, 0, 0, 1);
    fill(m2, 0, 0, 1);
    const double nan = std::numeric_limits<double>::quiet_NaN();
    const int64_t spoiled = block.columns / 2;
    x.set((block.rows - 1) * block.row_stride + spoiled, nan);
    loops_for<scalar_t>().column_moments(x.data(), block, 0, mean.data(), m2.data());
    for (int64_t column = 0; column < block.columns; ++column) {
      check.is_true(std::isnan(mean[column]) == (column == spoiled), "NaN in mean", column);
      check.is_true(std::isnan(m2[column]) == (column == spoiled), "NaN in m2", column);
    }
  });
}

// The sums of some numbers and of their magnitudes.
struct ExactSum {
  double total = 0;
  double magnitude = 0;

  void add(double term) {
    total += term;
    magnitude += std::fabs(term);
  }
};

struct ExactGradSums {
  ExactSum dy, dy_xmu;

  void add(double gradient, double x, double mean) {
    dy.add(gradient);
    dy_xmu.add(gradient * (x - mean));
  }
};

template <typename scalar_t>
void test_grad_sums(Check& check) {
  for_each_case(reduced_blocks(), [&](const Block2d& block, int64_t front, Numbers numbers) {
    check.on(Type<scalar_t>::kName, block, name(numbers));
    Buffer<scalar_t> dy(extent(block), front_of(block)), x(extent(block), front);
    fill(dy, block, Numbers::kSpread, false, 3);
    fill(x, block, numbers, false, block.columns);
    const double mean = static_cast<acc_type<scalar_t>>(x[0] * 0.7);
    ExactGradSums exact;
    for (int64_t row = 0; row < block.rows; ++row) {
      for (int64_t column = 0; column < block.columns; ++column) {
        const int64_t i = row * block.row_stride + column;
        exact.add(dy[i], x[i], mean);
      }
    }
    const double roundoff = kAccRoundoff<scalar_t> * roundings(block.elements());
    double sum_dy, sum_dy_xmu;
    loops_for<scalar_t>().grad_sums(dy.data(), x.data(), block, mean, &sum_dy, &sum_dy_xmu);
    check.is_near(sum_dy, exact.dy.total, roundoff * exact.dy.magnitude, "sum of dy");
    check.is_near(sum_dy_xmu, exact.dy_xmu.total, roundoff * exact.dy_xmu.magnitude,
                  "sum of dy * (x - mean)");

    strew_special(x, block);
    loops_for<scalar_t>().grad_sums(dy.data(), x.data(), block, mean, &sum_dy, &sum_dy_xmu);
    check.is_near(sum_dy, exact.dy.total, roundoff * exact.dy.magnitude, "sum of dy");
    check.is_true(!std::isfinite(sum_dy_xmu), "sum of dy * infinities");
  });
}

template <typename scalar_t>
void test_column_grad_sums(Check& check) {
  using acc_t = acc_type<scalar_t>;
  for_each_case(column_blocks(), [&](const Block2d& block, int64_t front, Numbers numbers) {
    check.on(Type<scalar_t>::kName, block, name(numbers));
    Buffer<scalar_t> dy(extent(block)), x(extent(block), front);
    Buffer<acc_t> mean(block.columns);
    Buffer<double> sum_dy(block.columns), sum_dy_xmu(block.columns);
    fill(dy, block, Numbers::kSpread, true, 3);
    fill(x, block, numbers, true, block.columns + block.rows);
    for (int64_t column = 0; column < block.columns; ++column) mean.set(column, x[column] * 0.7);
    fill(sum_dy, 10, 1, 4);
    fill(sum_dy_xmu, 20, 1, 5);
    std::vector<ExactGradSums> exact(block.columns);
    std::vector<double> held_dy, held_dy_xmu;
    for (int64_t column = 0; column < block.columns; ++column) {
      for (int64_t row = 0; row < block.rows; ++row) {
        const int64_t i = row * block.row_stride + column;
        exact[column].add(dy[i], x[i], mean[column]);
      }
      held_dy.push_back(sum_dy[column]);
      held_dy_xmu.push_back(sum_dy_xmu[column]);
    }
    loops_for<scalar_t>().column_grad_sums(dy.data(), x.data(), block, mean.data(), sum_dy.data(),
                                           sum_dy_xmu.data());
    const double roundoff = kAccRoundoff<scalar_t> * roundings(block.rows);
    const auto check_sum = [&](double got, double held, const ExactSum& sum, const char* what,
                               int64_t column) {
      const double expected = held + sum.total;
      check.is_near(got, expected, roundoff * sum.magnitude + 0x1p-52 * std::fabs(expected), what,
                    column);
    };
    for (int64_t column = 0; column < block.columns; ++column) {
      check_sum(sum_dy[column], held_dy[column], exact[column].dy, "sum of dy", column);
      check_sum(sum_dy_xmu[column], held_dy_xmu[column], exact[column].dy_xmu,
                "sum of dy * (x - mean)", column);
    }
  });
}

// ---- Elementwise ----

// What an elementwise loop is tried on.
struct ElementwiseCase {
  Block2d block;
  int64_t front;  // of the output, in its cache line: streaming stores begin at its vectors
  bool stream;
  int64_t step;
  Numbers numbers;
  bool special;  // infinities and the like among the numbers

  std::string details() const {
    return name(numbers) + (special ? " and special" : "") +
           (stream ? ", streamed, step " : ", step ") + std::to_string(step);
  }
};

template <typename scalar_t>
std::vector<ElementwiseCase> elementwise_cases(bool columns) {
  std::vector<ElementwiseCase> cases;
  const auto add = [&](const Block2d& block, int64_t front, bool stream) {
    for (int64_t step = columns ? 1 : 0; step <= 1; ++step) {
      cases.push_back({block, front, stream, step, Numbers::kSpread, false});
      cases.push_back({block, front, stream, step, Numbers::kSpread, true});
      cases.push_back({block, front, stream, step, Numbers::kTiny, false});
    }
  };
  for (const Block2d& block : columns ? column_blocks() : row_blocks()) {
    if (block.rows > 3) continue;  // rows do not know of one another
    for (int64_t front : {0, 1}) {
      add(block, front, false);
      add(block, front, true);
    }
  }
  for (int64_t front = 2; front * static_cast<int64_t>(sizeof(scalar_t)) < kCacheLine; ++front) {
    for (int64_t length : {61, 64, 131}) {
      add({1, length, length}, front, true);
      add({3, length + 5, length}, front, true);
    }
  }
  return cases;
}

// Per channel: about 1 for numbers that are, and as tiny as those that are.
template <typename acc_t>
void fill_coefficients(Buffer<acc_t>& buffer, const ElementwiseCase& one, uint64_t seed) {
  fill(buffer, 0, one.numbers == Numbers::kTiny ? 1e-6 : 1, seed);
}

// What an element may be off by in acc_t and rounded to scalar_t; `magnitude` is the sum of its
// terms' magnitudes.
template <typename scalar_t>
void check_element(Check& check, double got, double expected, double magnitude, int64_t index) {
  const double acc_error = 8 * kAccRoundoff<scalar_t> * magnitude;
  const double error = acc_error + Type<scalar_t>::kRoundoff * (std::fabs(expected) + acc_error) +
                       Type<scalar_t>::kSmallest + Type<acc_type<scalar_t>>::kSmallest;
  check.is_near(got, expected, error, "element", index);
}

// Checks all that was written, and that nothing else was. expect(row, column, index) returns the
// value and the sum of the magnitudes of its terms.
template <typename scalar_t, typename Expect>
void check_output(Check& check, const Buffer<scalar_t>& out, const Block2d& block, Expect expect) {
  check.is_true(out.front_untouched(), "what lies in front is untouched");
  for (int64_t row = 0; row < block.rows; ++row) {
    const int64_t first = row * block.row_stride;
    for (int64_t column = 0; column < block.columns; ++column) {
      const auto [value, magnitude] = expect(row, column, first + column);
      check_element<scalar_t>(check, out[first + column], value, magnitude, first + column);
    }
    const int64_t next = row + 1 < block.rows ? block.row_stride : block.columns;
    for (int64_t column = block.columns; column < next; ++column) {
      check.is_true(out.untouched(first + column), "what lies between rows is untouched",
                    first + column);
    }
  }
}

struct Expected {
  double value, magnitude;
};

Expected affine(double x, double mean, double scale, double shift) {
  const double scaled = (x - mean) * scale;
  return {scaled + shift, std::fabs(scaled) + std::fabs(shift)};
}

Expected grad_affine(double dy, double x, double mean, double scale, double slope, double offset) {
  const double scaled = dy * scale;
  const double sloped = (x - mean) * slope;
  return {scaled + (sloped + offset), std::fabs(scaled) + std::fabs(sloped) + std::fabs(offset)};
}

// `columns`: of normalize_columns, else of normalize.
template <typename scalar_t>
void test_normalize(Check& check, bool columns) {
  for (const ElementwiseCase& one : elementwise_cases<scalar_t>(columns)) {
    const Block2d& block = one.block;
    check.on(Type<scalar_t>::kName, block, one.details());
    Buffer<scalar_t> x(extent(block), front_of(block)), y(extent(block), one.front);
    fill(x, block, one.numbers, columns, block.columns);
    if (one.special) strew_special(x, block);

    const int64_t channels = columns ? block.columns : one.step == 0 ? 1 : block.rows;
    Buffer<acc_type<scalar_t>> mean(channels), scale(channels), shift(channels);
    fill_coefficients(mean, one, 11);
    fill(scale, 1, 0.5, 12);
    fill_coefficients(shift, one, 13);
    const AffineColumns coefficients{mean.data(), scale.data(), shift.data()};
    const Loops& loops = loops_for<scalar_t>();
    if (columns) {
      loops.normalize_columns(x.data(), y.data(), block, coefficients, one.stream);
    } else {
      loops.normalize(x.data(), y.data(), block, coefficients, one.step, one.stream);
    }
    check_output(check, y, block, [&](int64_t row, int64_t column, int64_t i) {
      const int64_t c = columns ? column : row * one.step;
      return affine(x[i], mean[c], scale[c], shift[c]);
    });
  }
}

// `columns`: of grad_input_columns, else of grad_input.
template <typename scalar_t>
void test_grad_input(Check& check, bool columns) {
  for (const ElementwiseCase& one : elementwise_cases<scalar_t>(columns)) {
    const Block2d& block = one.block;
    check.on(Type<scalar_t>::kName, block, one.details());
    Buffer<scalar_t> dy(extent(block), front_of(block)), x(extent(block), front_of(block));
    Buffer<scalar_t> dx(extent(block), one.front);
    fill(dy, block, one.numbers, columns, 15);
    fill(x, block, Numbers::kSpread, columns, block.columns);
    if (one.special) strew_special(dy, block);

    const int64_t channels = columns ? block.columns : one.step == 0 ? 1 : block.rows;
    Buffer<acc_type<scalar_t>> mean(channels), scale(channels), slope(channels), offset(channels);
    fill(mean, 0, 1, 11);
    fill(scale, 1, 0.5, 12);
    fill_coefficients(slope, one, 13);
    fill_coefficients(offset, one, 14);
    const GradAffineColumns coefficients{mean.data(), scale.data(), slope.data(), offset.data()};
    const Loops& loops = loops_for<scalar_t>();
    if (columns) {
      loops.grad_input_columns(dy.data(), x.data(), dx.data(), block, coefficients, one.stream);
    } else {
      loops.grad_input(dy.data(), x.data(), dx.data(), block, coefficients, one.step, one.stream);
    }
    check_output(check, dx, block, [&](int64_t row, int64_t column, int64_t i) {
      const int64_t c = columns ? column : row * one.step;
      return grad_affine(dy[i], x[i], mean[c], scale[c], slope[c], offset[c]);
    });
  }
}

// ---- Conversions ----

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

// ---- disjoint() ----

// One of two activations of 2 samples, 3 channels and 5 * 7 positions with room between rows.
template <typename Data>
Activation<Data> activation_at(Data* data) {
  Activation<Data> activation;
  activation.data = data;
  activation.batch_stride = 400;
  activation.channel_stride = 100;
  activation.spatial_dims = 2;
  activation.sizes[0] = 5;
  activation.sizes[1] = 7;
  activation.strides[0] = 10;
  activation.strides[1] = 1;
  return activation;
}

void test_disjoint(Check& check) {
  for (const DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    const int64_t size = element_size(dtype);
    const int64_t extent = 400 + 2 * 100 + 4 * 10 + 6 + 1;
    std::vector<char> memory(3 * extent * size);
    char* middle = memory.data() + extent * size;
    Problem problem;
    problem.dtype = dtype;
    problem.layout = Layout::kGeneric;
    problem.batch = 2;
    problem.channels = 3;
    problem.spatial = 35;
    const auto apart = [&](char* output, const char* input) {
      return disjoint(problem, activation_at<void>(output), activation_at<const void>(input));
    };
    check.on("disjoint", {2, extent, extent}, std::to_string(size) + " bytes");
    check.is_true(extent_bytes(problem, activation_at<void>(middle)) == extent * size, "extent");
    check.is_true(!apart(middle, middle), "itself");
    check.is_true(apart(nullptr, middle), "no output");
    for (int64_t shift = -extent; shift <= extent; ++shift) {
      const bool touches = shift > -extent && shift < extent;
      check.is_true(apart(middle, middle + shift * size) != touches, "input behind", shift);
      check.is_true(apart(middle + shift * size, middle) != touches, "output behind", shift);
    }
    problem.batch = 0;
    check.is_true(extent_bytes(problem, activation_at<void>(middle)) == 0, "extent of nothing");
    check.is_true(apart(middle, middle), "nothing");
  }
}

// Calls test(check, a value of the type) for every dtype.
template <typename Test>
bool passes(const char* function, Test test) {
  Check check(function);
  test(check, double{});
  test(check, float{});
  test(check, BFloat16{});
  test(check, Float16{});
  return check.report();
}

bool all_pass() {
  const bool results[] = {
      passes("moments", [](Check& c, auto t) { test_moments<decltype(t)>(c); }),
      passes("column_moments", [](Check& c, auto t) { test_column_moments<decltype(t)>(c); }),
      passes("grad_sums", [](Check& c, auto t) { test_grad_sums<decltype(t)>(c); }),
      passes("column_grad_sums", [](Check& c, auto t) { test_column_grad_sums<decltype(t)>(c); }),
      passes("normalize", [](Check& c, auto t) { test_normalize<decltype(t)>(c, false); }),
      passes("normalize_columns", [](Check& c, auto t) { test_normalize<decltype(t)>(c, true); }),
      passes("grad_input", [](Check& c, auto t) { test_grad_input<decltype(t)>(c, false); }),
      passes("grad_input_columns", [](Check& c, auto t) { test_grad_input<decltype(t)>(c, true); }),
      passes("pack", [](Check& c, auto t) { test_pack<decltype(t)>(c); }),
      passes("unpack", [](Check& c, auto t) { test_unpack<decltype(t)>(c); }),
  };
  Check disjoint("disjoint");
  test_disjoint(disjoint);
  return disjoint.report() &&
         std::all_of(std::begin(results), std::end(results), [](bool passed) { return passed; });
}

}  // namespace fastbn::cpuloops

int main() {
  std::printf("%s\n", fastbn::cpu::capability());
  return fastbn::cpuloops::all_pass() ? 0 : 1;
}
