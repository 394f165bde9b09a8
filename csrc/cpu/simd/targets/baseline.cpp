// SPDX-License-Identifier: BSD-3-Clause
//
// The loops for any processor: SSE2 on x86-64, NEON on 64-bit ARM.
#define FASTBN_CAPABILITY baseline
#define FASTBN_VECTOR_BYTES 16
#include "../loops_impl.h"
