// SPDX-License-Identifier: BSD-3-Clause
//
// The loops that compute an element from one: normalize and grad_input.
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "buffer.h"
#include "cases.h"
#include "check.h"
#include "formats.h"
#include "tests.h"

namespace fastbn::cpuloops {

namespace {

using cpu::AffineColumns;
using cpu::GradAffineColumns;
using cpu::Loops;

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

}  // namespace

bool elementwise_pass() {
  const bool results[] = {
      passes("normalize", [](Check& c, auto t) { test_normalize<decltype(t)>(c, false); }),
      passes("normalize_columns", [](Check& c, auto t) { test_normalize<decltype(t)>(c, true); }),
      passes("grad_input", [](Check& c, auto t) { test_grad_input<decltype(t)>(c, false); }),
      passes("grad_input_columns", [](Check& c, auto t) { test_grad_input<decltype(t)>(c, true); }),
  };
  return all(results);
}

}  // namespace fastbn::cpuloops
