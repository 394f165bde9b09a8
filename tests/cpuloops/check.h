// SPDX-License-Identifier: BSD-3-Clause
//
// Counts what is checked of a function, and says what was wrong.
#pragma once

#include <cinttypes>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>

#include "../../csrc/cpu/simd/loops.h"

namespace fastbn::cpuloops {

constexpr int kMostShown = 5;

class Check {
 public:
  explicit Check(const char* function) : function_(function) {}

  // Says what the checks that follow are made on.
  void on(const char* dtype, const cpu::Block2d& block, const std::string& details) {
    where_ = std::string(dtype) + ", rows " + std::to_string(block.rows) + " of " +
             std::to_string(block.columns) + " every " + std::to_string(block.row_stride) + ", " +
             details;
  }

  void is_true(bool value, const char* what, int64_t index = 0) {
    ++checks_;
    if (!value) fail("%s at %" PRId64, what, index);
  }

  // Two NaNs are equal, and so are two infinities of one sign.
  void is_near(double got, double expected, double tolerance, const char* what, int64_t index = 0) {
    ++checks_;
    const bool same = std::isnan(expected) ? std::isnan(got) : got == expected;
    if (!same && !(std::fabs(got - expected) <= tolerance && std::isfinite(expected))) {
      fail("%s at %" PRId64 " is %.17g, not %.17g within %.3g", what, index, got, expected,
           tolerance);
    }
  }

  // The function's line; whether all was right.
  bool report() const {
    std::printf("%-20s %9" PRId64 " checks, %" PRId64 " failed\n", function_, checks_, failures_);
    return checks_ > 0 && failures_ == 0;
  }

 private:
  template <typename... Arguments>
  void fail(const char* format, Arguments... arguments) {
    if (++failures_ > kMostShown) return;
    std::printf("  %s (%s): ", function_, where_.c_str());
    std::printf(format, arguments...);
    std::printf("\n");
  }

  const char* function_;
  std::string where_;
  int64_t checks_ = 0;
  int64_t failures_ = 0;
};

}  // namespace fastbn::cpuloops
