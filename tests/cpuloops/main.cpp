// SPDX-License-Identifier: BSD-3-Clause
//
// Every function of struct Loops against its formula in double, for all dtypes, in the instruction
// set that FASTBN_CPU_CAPABILITY names; and disjoint(), what the loops demand of their
// callers. Prints that instruction set and a line per function; returns 1 where a check failed.
#include <cstdio>

#include "../../csrc/cpu/simd/loops.h"
#include "tests.h"

int main() {
  using namespace fastbn::cpuloops;
  std::printf("%s\n", fastbn::cpu::capability());
  const bool results[] = {reductions_pass(), elementwise_pass(), epilogues_pass(),
                          conversions_pass(), disjoint_passes()};
  return all(results) ? 0 : 1;
}
