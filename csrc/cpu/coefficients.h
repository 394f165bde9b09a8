// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>
#include <vector>

#include "channel.h"
#include "simd/loops.h"

namespace fastbn::cpu {

// The coefficients of an elementwise pass as the loops take them: an array of acc_t for each, a
// value per column.
class Coefficients {
 public:
  Coefficients(const Problem& problem, int64_t columns)
      : dtype_(accumulate_dtype(problem.dtype)), columns_(columns), storage_(kArrays * columns) {}

  void set(int64_t column, const Affine<double>& affine) {
    write(0, column, affine.mean);
    write(1, column, affine.scale);
    write(2, column, affine.shift);
  }
  void set(int64_t column, const GradAffine<double>& affine) {
    write(0, column, affine.mean);
    write(1, column, affine.scale);
    write(2, column, affine.slope);
    write(3, column, affine.offset);
  }

  void set(int64_t column, const ActivatedGradAffine<double>& affine) {
    set(column, affine.gradient);
    write(4, column, affine.shift);
  }

  // The arrays from `column` on.
  const void* mean(int64_t column) const { return at(0, column); }
  AffineColumns affine(int64_t column) const {
    return {at(0, column), at(1, column), at(2, column)};
  }
  GradAffineColumns grad_affine(int64_t column) const {
    return {at(0, column), at(1, column), at(2, column), at(3, column)};
  }
  ActivatedGradColumns activated_grad(int64_t column) const {
    return {{at(0, column), at(1, column), at(4, column)}, at(2, column), at(3, column)};
  }

 private:
  static constexpr int kArrays = sizeof(ActivatedGradAffine<double>) / sizeof(double);

  int64_t offset(int array, int64_t column) const {
    return (array * columns_ + column) * element_size(dtype_);
  }
  const char* at(int array, int64_t column) const {
    return reinterpret_cast<const char*>(storage_.data()) + offset(array, column);
  }
  void write(int array, int64_t column, double value) {
    char* const first = reinterpret_cast<char*>(storage_.data());
    cpu::write({first + offset(array, column), dtype_, 1}, 0, value);
  }

  DType dtype_;
  int64_t columns_;
  std::vector<double> storage_;  // of acc_t, which is no wider than double
};

}  // namespace fastbn::cpu
