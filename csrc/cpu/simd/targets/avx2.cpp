// SPDX-License-Identifier: BSD-3-Clause
//
// The loops for AVX2, FMA and F16C.
#if defined(__x86_64__)
// Shared headers come before the target: a function of theirs compiled for it must not be the
// copy that the linker keeps for everyone.
#include <immintrin.h>

#include <cstdint>
#include <type_traits>

#include "../../../core/moments.h"
#include "../loops.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define FASTBN_CAPABILITY avx2
#define FASTBN_VECTOR_BYTES 32
#include "../loops_impl.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
