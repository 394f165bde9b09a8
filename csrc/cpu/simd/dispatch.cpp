// SPDX-License-Identifier: BSD-3-Clause
//
// Chooses the instruction set once per process.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "loops.h"

namespace fastbn::cpu {

namespace scalar {
const Loops& loops(DType dtype);
}
namespace baseline {
const Loops& loops(DType dtype);
}
#if defined(__x86_64__)
namespace avx2 {
const Loops& loops(DType dtype);
}
namespace avx512 {
const Loops& loops(DType dtype);
}
#endif

namespace {

struct Capability {
  const char* name;
  const Loops& (*loops)(DType);
  bool available;
};

#if defined(__x86_64__)
// Without __builtin_cpu_supports("f16c"): clang 14 does not know that name.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

// The widest that the processor has and FASTBN_CPU_CAPABILITY, if it names one, does not exceed.
Capability choose() {
#if defined(__x86_64__)
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  const Capability from_widest[] = {
#if defined(__x86_64__)
      {"avx512", avx512::loops, has_avx512},
      {"avx2", avx2::loops, has_avx2},
#endif
      {"default", baseline::loops, true},
      {"scalar", scalar::loops, true},
  };
  const char* cap = std::getenv("FASTBN_CPU_CAPABILITY");
  const char* const known[] = {"scalar", "default", "avx2", "avx512"};
  const auto same = [&](const char* name) { return std::strcmp(name, cap) == 0; };
  if (cap != nullptr && std::none_of(std::begin(known), std::end(known), same)) {
    throw std::invalid_argument(std::string("FASTBN_CPU_CAPABILITY is '") + cap +
                                "'; it may be scalar, default, avx2 or avx512");
  }
  const auto is_cap = [&](const Capability& one) { return std::strcmp(one.name, cap) == 0; };
  const bool has_cap =
      cap != nullptr && std::any_of(std::begin(from_widest), std::end(from_widest), is_cap);
  bool below_cap = !has_cap;
  for (const Capability& one : from_widest) {
    below_cap = below_cap || is_cap(one);
    if (below_cap && one.available) return one;
  }
  return from_widest[0];  // not reached: the last two are always there
}

const Capability& chosen() {
  static const Capability capability = choose();
  return capability;
}

}  // namespace

const Loops& loops(DType dtype) { return chosen().loops(dtype); }

const char* capability() { return chosen().name; }

}  // namespace fastbn::cpu
