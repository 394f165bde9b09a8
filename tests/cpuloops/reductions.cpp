// SPDX-License-Identifier: BSD-3-Clause
//
// The loops that reduce a block: moments and sums of gradients.
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "buffer.h"
#include "cases.h"
#include "check.h"
#include "formats.h"
#include "tests.h"

namespace fastbn::cpuloops {

namespace {

// Roundings that a sum of `count` terms in acc_t may have: they add up like a random walk, and
// those of every term come on top. For float64 the formula's own are among them.
double roundings(int64_t count) { return 8 + std::sqrt(static_cast<double>(count)); }

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
        const ExactMoments& exact = columns[column];
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

}  // namespace

bool reductions_pass() {
  const bool results[] = {
      passes("moments", [](Check& c, auto t) { test_moments<decltype(t)>(c); }),
      passes("column_moments", [](Check& c, auto t) { test_column_moments<decltype(t)>(c); }),
      passes("grad_sums", [](Check& c, auto t) { test_grad_sums<decltype(t)>(c); }),
      passes("column_grad_sums", [](Check& c, auto t) { test_column_grad_sums<decltype(t)>(c); }),
  };
  return all(results);
}

}  // namespace fastbn::cpuloops
