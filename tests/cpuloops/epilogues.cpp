// SPDX-License-Identifier: BSD-3-Clause
//
// The loops that know of an epilogue, against its formulas in double.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "../../csrc/core/activation_functions.h"
#include "../../csrc/core/mask.h"
#include "buffer.h"
#include "cases.h"
#include "check.h"
#include "formats.h"
#include "tests.h"

namespace fastbn::cpuloops {

namespace {

using cpu::AffineColumns;
using cpu::EpilogueLoop;

// The Math of the formulas: the C++ library's.
struct ExactMath {
  using Value = double;
  static double number(double value) { return value; }
  static double exp(double z) { return std::exp(z); }
  static double expm1(double z) { return std::expm1(z); }
  static double normal_cdf(double z, double) { return 0.5 * std::erfc(-z / std::sqrt(2.0)); }
};

const std::vector<ActivationFunction>& functions() {
#define FASTBN_FUNCTION(Function, name) ActivationFunction::k##Function,
  static const std::vector<ActivationFunction> all{FASTBN_ACTIVATION_FUNCTIONS(FASTBN_FUNCTION)};
#undef FASTBN_FUNCTION
  return all;
}

// No slope is steeper, nor changes faster, but at kinks.
constexpr double kSteepest = 1.6;

// A block of x, dy and a residual with the coefficients of their channels, and what follows.
template <typename scalar_t>
struct EpilogueCase {
  using acc_t = acc_type<scalar_t>;

  EpilogueCase(const Block2d& block, bool columns, ActivationFunction function, bool added,
               double spread)
      : block(block),
        columns(columns),
        function(function),
        x(extent(block)),
        dy(extent(block)),
        residual(extent(block)),
        mean(columns ? block.columns : 1),
        scale(mean.size()),
        shift(mean.size()),
        slope(mean.size()),
        offset(mean.size()),
        added(added) {
    cpuloops::fill(x, block, Numbers::kSpread, columns, 31);
    cpuloops::fill(dy, block, Numbers::kSpread, columns, 32);
    cpuloops::fill(residual, block, Numbers::kSpread, columns, 33);
    fill(mean, 0, 1, 34);
    fill(scale, spread, 0.5, 35);
    fill(shift, 0, spread, 36);
    fill(slope, 0, 1, 37);
    fill(offset, 0, 1, 38);
  }

  int64_t channel(int64_t column) const { return columns ? column : 0; }
  AffineColumns affine() { return {mean.data(), scale.data(), shift.data()}; }
  EpilogueLoop epilogue() {
    return {function, kParameter, Type<scalar_t>::kDType, added ? residual.data() : nullptr};
  }

  double centered(int64_t i, int64_t column) const { return x[i] - mean[channel(column)]; }
  double z(int64_t i, int64_t column) const {
    const int64_t c = channel(column);
    return centered(i, column) * scale[c] + shift[c] + (added ? residual[i] : 0);
  }
  // What z may err by.
  double uncertainty(int64_t i, int64_t column) const {
    const int64_t c = channel(column);
    const double terms = std::fabs(centered(i, column) * scale[c]) + std::fabs(shift[c]) +
                         (added ? std::fabs(residual[i]) : 0);
    return 8 * kAccRoundoff<scalar_t> * terms;
  }
  double value(int64_t i, int64_t column) const {
    double value = 0;
    with_function<ExactMath>(function,
                             [&](auto chosen) { value = chosen.value(z(i, column), kParameter); });
    return value;
  }
  double value_error(int64_t i, int64_t column) const {
    return kSteepest * uncertainty(i, column) +
           32 * kAccRoundoff<scalar_t> * (std::fabs(value(i, column)) + uncertainty(i, column));
  }
  double slope_at(double z) const {
    const double held = Type<scalar_t>::decode(Type<scalar_t>::encode(z));
    double slope = 0;
    with_function<ExactMath>(function,
                             [&](auto chosen) { slope = chosen.derivative(held, kParameter); });
    return slope;
  }
  double dz(int64_t i, int64_t column) const { return dy[i] * slope_at(z(i, column)); }
  // Slopes on both sides of z may be those of both sides of a kink, or of different 16-bit numbers.
  double dz_error(int64_t i, int64_t column) const {
    const double error = uncertainty(i, column);
    const double low = slope_at(z(i, column) - error), high = slope_at(z(i, column) + error);
    const double middle = slope_at(z(i, column));
    const double apart = std::max({low, middle, high}) - std::min({low, middle, high});
    return std::fabs(dy[i]) * (apart + kSteepest * error + 64 * kAccRoundoff<scalar_t>);
  }

  static constexpr double kParameter = 0.25;

  Block2d block;
  bool columns;
  ActivationFunction function;
  Buffer<scalar_t> x, dy, residual;
  Buffer<acc_t> mean, scale, shift, slope, offset;
  bool added;
};

// Whether a function has to be tried on a block: all on those of one row, and on the others, whose
// rows know nothing of functions, ReLU, which has loops of its own, and one that has none.
bool matters(ActivationFunction function, const Block2d& block) {
  return block.rows == 1 || function == ActivationFunction::kRelu ||
         function == ActivationFunction::kSilu;
}

// Calls body(case) for functions on blocks with every remainder of a vector.
template <typename scalar_t, typename Body>
void for_each_case(Check& check, bool columns, const Body& body) {
  const std::vector<Block2d> blocks{{1, 0, 16}, {1, 0, 131}, {3, 40, 37}, {9, 70, 64}, {5, 99, 99}};
  for (const Block2d& block : blocks) {
    for (const ActivationFunction function : functions()) {
      if (!matters(function, block)) continue;
      for (const bool added : {false, true}) {
        // Both where functions are curved and where they are as good as straight.
        for (const double spread : {1.0, 12.0}) {
          EpilogueCase<scalar_t> one(block, columns, function, added, spread);
          check.on(Type<scalar_t>::kName, block,
                   "function " + std::to_string(static_cast<int>(function)) +
                       (added ? " with residual" : "") + ", spread " + std::to_string(spread));
          body(one);
        }
      }
    }
  }
}

// Calls body(index, column) for each element of a block.
template <typename Body>
void for_each_element(const Block2d& block, const Body& body) {
  for (int64_t row = 0; row < block.rows; ++row) {
    for (int64_t column = 0; column < block.columns; ++column) {
      body(row * block.row_stride + column, column);
    }
  }
}

template <typename scalar_t>
double rounding(double value) {
  return Type<scalar_t>::kRoundoff * std::fabs(value) + Type<scalar_t>::kSmallest +
         Type<acc_type<scalar_t>>::kSmallest;
}

template <typename scalar_t>
void test_activate(Check& check, bool columns) {
  for_each_case<scalar_t>(check, columns, [&](EpilogueCase<scalar_t>& one) {
    for (const bool stream : {false, true}) {
      Buffer<scalar_t> y(extent(one.block));
      const auto& loops = loops_for<scalar_t>();
      if (columns) {
        loops.activate_columns(one.x.data(), y.data(), one.block, one.affine(), one.epilogue(),
                               stream);
      } else {
        loops.activate(one.x.data(), y.data(), one.block, one.affine(), 0, one.epilogue(), stream);
      }
      for_each_element(one.block, [&](int64_t i, int64_t column) {
        const double error = one.value_error(i, column);
        const double expected = one.value(i, column);
        check.is_near(y[i], expected, error + rounding<scalar_t>(expected), "y", i);
      });
    }
  });
}

template <typename scalar_t>
void test_grad_sums(Check& check, bool columns) {
  for_each_case<scalar_t>(check, columns, [&](EpilogueCase<scalar_t>& one) {
    for (const bool keep : {false, true}) {
      const int64_t channels = one.mean.size();
      std::vector<double> sums(channels), products(channels);
      Buffer<scalar_t> dz(extent(one.block));
      void* kept = keep ? dz.data() : nullptr;
      const auto& loops = loops_for<scalar_t>();
      (columns ? loops.activated_column_grad_sums : loops.activated_grad_sums)(
          one.dy.data(), one.x.data(), kept, one.block, one.affine(), one.epilogue(), sums.data(),
          products.data());
      std::vector<double> sum(channels), sum_error(channels), product(channels),
          product_error(channels);
      for_each_element(one.block, [&](int64_t i, int64_t column) {
        const int64_t c = one.channel(column);
        const double value = one.dz(i, column), error = one.dz_error(i, column);
        if (keep) check.is_near(dz[i], value, error + rounding<scalar_t>(value), "dz", i);
        const double centered = one.centered(i, column);
        const double summing = error + 16 * kAccRoundoff<scalar_t> * std::fabs(one.dy[i]);
        sum[c] += value;
        sum_error[c] += summing;
        product[c] += value * centered;
        product_error[c] += summing * (std::fabs(centered) + kAccRoundoff<scalar_t>);
      });
      for (int64_t c = 0; c < channels; ++c) {
        check.is_near(sums[c], sum[c], sum_error[c], "sum", c);
        check.is_near(products[c], product[c], product_error[c], "product", c);
      }
    }
  });
}

// Masks of blocks whose rows begin and end with a byte: forward's bits are the slopes, if it is not
// open which, and change nothing else; what backward makes of bits is exact.
template <typename scalar_t>
void test_masks(Check& check, bool columns) {
  constexpr int kEach = kMaskedBytes / sizeof(scalar_t);
  const auto& loops = loops_for<scalar_t>();
  for (const Block2d& block : {Block2d{1, 0, 16}, {1, 0, 136}, {3, 48, 32}, {9, 80, 72}}) {
    for (const ActivationFunction function : functions()) {
      if (!has_two_slopes(function)) continue;
      EpilogueCase<scalar_t> one(block, columns, function, true, 4);
      check.on(Type<scalar_t>::kName, block,
               "function " + std::to_string(static_cast<int>(function)));
      EpilogueLoop without = one.epilogue(), forward = without, backward = without;
      std::vector<uint8_t> mask(extent(block) / kEach, 0xff);
      forward.mask_out = mask.data();
      backward.mask = mask.data();
      backward.residual = nullptr;
      Buffer<scalar_t> y(extent(block)), plain(extent(block)), dz(extent(block));
      if (columns) {
        loops.activate_columns(one.x.data(), y.data(), block, one.affine(), forward, false);
        loops.activate_columns(one.x.data(), plain.data(), block, one.affine(), without, false);
      } else {
        loops.activate(one.x.data(), y.data(), block, one.affine(), 0, forward, false);
        loops.activate(one.x.data(), plain.data(), block, one.affine(), 0, without, false);
      }
      const int64_t channels = one.mean.size();
      std::vector<double> sums(channels), products(channels), sum(channels), error(channels);
      (columns ? loops.activated_column_grad_sums : loops.activated_grad_sums)(
          one.dy.data(), one.x.data(), dz.data(), block, one.affine(), backward, sums.data(),
          products.data());
      const double other = other_slope(function, one.kParameter);
      for_each_element(block, [&](int64_t i, int64_t column) {
        check.is_near(y[i], plain[i], 0, "y", i);
        const int bit = mask[i / kEach] >> i % kEach & 1;
        const double z = one.z(i, column), unsure = one.uncertainty(i, column);
        if (one.slope_at(z - unsure) == one.slope_at(z + unsure)) {
          check.is_near(bit, one.slope_at(z) == 1, 0, "bit", i);
        }
        const double value = bit ? one.dy[i] : other * one.dy[i];
        check.is_near(dz[i], value, bit ? 0 : rounding<scalar_t>(value), "dz", i);
        sum[one.channel(column)] += value;
        error[one.channel(column)] += 16 * kAccRoundoff<scalar_t> * std::fabs(one.dy[i]);
      });
      for (int64_t c = 0; c < channels; ++c) check.is_near(sums[c], sum[c], error[c], "sum", c);
      for (int64_t row = 0; row + 1 < block.rows; ++row) {
        const int64_t begin = row * block.row_stride + block.columns;
        for (int64_t i = begin; i < (row + 1) * block.row_stride; i += kEach) {
          check.is_near(mask[i / kEach], 0xff, 0, "byte between rows", i);
        }
      }
    }
  }
}

template <typename scalar_t>
void test_activation_grad(Check& check) {
  for_each_case<scalar_t>(check, true, [&](EpilogueCase<scalar_t>& one) {
    for (const int64_t shorter : {int64_t{0}, one.block.columns - 3}) {
      Block2d block = one.block;
      block.columns -= shorter;
      Buffer<scalar_t> dz(extent(one.block));
      loops_for<scalar_t>().activation_grad_columns(one.dy.data(), one.x.data(), dz.data(), block,
                                                    one.affine(), one.epilogue());
      for_each_element(block, [&](int64_t i, int64_t column) {
        const double value = one.dz(i, column), error = one.dz_error(i, column);
        check.is_near(dz[i], value, error + rounding<scalar_t>(value), "dz", i);
      });
    }
  });
}

template <typename scalar_t>
void test_relu_grad_input(Check& check, bool columns) {
  for_each_case<scalar_t>(check, columns, [&](EpilogueCase<scalar_t>& one) {
    if (one.function != ActivationFunction::kRelu) return;
    for (const bool training : {false, true}) {
      Buffer<scalar_t> dx(extent(one.block));
      const cpu::ActivatedGradColumns gradient{one.affine(), one.slope.data(), one.offset.data()};
      const auto& loops = loops_for<scalar_t>();
      if (columns) {
        loops.relu_grad_input_columns(one.dy.data(), one.x.data(), dx.data(), one.block, gradient,
                                      one.epilogue(), training, false);
      } else {
        loops.relu_grad_input(one.dy.data(), one.x.data(), dx.data(), one.block, gradient, 0,
                              one.epilogue(), training, false);
      }
      for_each_element(one.block, [&](int64_t i, int64_t column) {
        const int64_t c = one.channel(column);
        const double through = one.dz(i, column) * one.scale[c];
        const double along = training ? one.centered(i, column) * one.slope[c] : 0;
        const double across = training ? one.offset[c] : 0;
        const double terms = std::fabs(through) + std::fabs(along) + std::fabs(across);
        const double error =
            one.dz_error(i, column) * std::fabs(one.scale[c]) + 8 * kAccRoundoff<scalar_t> * terms;
        const double expected = through + along + across;
        check.is_near(dx[i], expected, error + rounding<scalar_t>(expected), "dx", i);
      });
    }
  });
}

// What passes that write where they read leave is what others leave.
template <typename scalar_t>
void test_in_place(Check& check, bool columns) {
  for (const int64_t length : {16, 37, 64, 131}) {
    const Block2d block{3, length + 2, length};
    EpilogueCase<scalar_t> one(block, columns, ActivationFunction::kIdentity, false, 1);
    check.on(Type<scalar_t>::kName, block, "in place");
    Buffer<scalar_t> apart(extent(block)), in_place(extent(block));
    for_each_element(block, [&](int64_t i, int64_t) { in_place.set(i, one.dy[i]); });
    const cpu::GradAffineColumns gradient{one.mean.data(), one.scale.data(), one.slope.data(),
                                          one.offset.data()};
    const auto& loops = loops_for<scalar_t>();
    for (Buffer<scalar_t>* to : {&apart, &in_place}) {
      const void* dy = to == &apart ? one.dy.data() : in_place.data();
      if (columns) {
        loops.grad_input_columns(dy, one.x.data(), to->data(), block, gradient, false);
      } else {
        loops.grad_input(dy, one.x.data(), to->data(), block, gradient, 0, false);
      }
    }
    for_each_element(block,
                     [&](int64_t i, int64_t) { check.is_near(in_place[i], apart[i], 0, "dx", i); });
  }
}

}  // namespace

bool epilogues_pass() {
  const bool results[] = {
      passes("activate", [](Check& c, auto t) { test_activate<decltype(t)>(c, false); }),
      passes("activate_columns", [](Check& c, auto t) { test_activate<decltype(t)>(c, true); }),
      passes("activated_grad_sums",
             [](Check& c, auto t) { test_grad_sums<decltype(t)>(c, false); }),
      passes("activated_column_grad_sums",
             [](Check& c, auto t) { test_grad_sums<decltype(t)>(c, true); }),
      passes("masks", [](Check& c, auto t) { test_masks<decltype(t)>(c, false); }),
      passes("masks_of_columns", [](Check& c, auto t) { test_masks<decltype(t)>(c, true); }),
      passes("activation_grad_columns",
             [](Check& c, auto t) { test_activation_grad<decltype(t)>(c); }),
      passes("relu_grad_input",
             [](Check& c, auto t) { test_relu_grad_input<decltype(t)>(c, false); }),
      passes("relu_grad_input_columns",
             [](Check& c, auto t) { test_relu_grad_input<decltype(t)>(c, true); }),
      passes("in_place", [](Check& c, auto t) { test_in_place<decltype(t)>(c, false); }),
      passes("in_place_columns", [](Check& c, auto t) { test_in_place<decltype(t)>(c, true); }),
  };
  return all(results);
}

}  // namespace fastbn::cpuloops
