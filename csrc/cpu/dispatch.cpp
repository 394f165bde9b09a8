// SPDX-License-Identifier: BSD-3-Clause
//
// Chooses the instruction set once per process.
#include <cstdlib>
#include <cstring>

#include "loops.h"

namespace fastbn::cpu {

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
};

// From the widest to the one every processor has.
Capability choose() {
#if defined(__x86_64__)
  const char* cap = std::getenv("FASTBN_CPU_CAPABILITY");
  const bool allow_avx2 = cap == nullptr || std::strcmp(cap, "default") != 0;
  const bool allow_avx512 = allow_avx2 && (cap == nullptr || std::strcmp(cap, "avx2") != 0);
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (allow_avx512 && has_avx512) return {"avx512", avx512::loops};
  if (allow_avx2 && has_avx2) return {"avx2", avx2::loops};
#endif
  return {"default", baseline::loops};
}

const Capability& chosen() {
  static const Capability capability = choose();
  return capability;
}

}  // namespace

const Loops& loops(DType dtype) { return chosen().loops(dtype); }

const char* capability() { return chosen().name; }

}  // namespace fastbn::cpu
