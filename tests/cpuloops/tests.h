// SPDX-License-Identifier: BSD-3-Clause
//
// What main() runs, and what its parts share. Each part prints a line per function and returns
// whether all checks passed.
#pragma once

#include <algorithm>
#include <iterator>

#include "../../csrc/core/dtype.h"
#include "../../csrc/cpu/simd/loops.h"
#include "check.h"
#include "formats.h"

namespace fastbn::cpuloops {

bool reductions_pass();
bool elementwise_pass();
bool epilogues_pass();
bool conversions_pass();
bool disjoint_passes();

template <typename scalar_t>
constexpr double kAccRoundoff = Type<acc_type<scalar_t>>::kRoundoff;

template <typename scalar_t>
const cpu::Loops& loops_for() {
  return cpu::loops(Type<scalar_t>::kDType);
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

template <int kCount>
bool all(const bool (&results)[kCount]) {
  return std::all_of(std::begin(results), std::end(results), [](bool passed) { return passed; });
}

}  // namespace fastbn::cpuloops
