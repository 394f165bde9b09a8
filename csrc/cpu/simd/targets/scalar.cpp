// SPDX-License-Identifier: BSD-3-Clause
//
// The loops one element at a time: to tell a fault of the vectors from one of the algorithm, and
// for processors without vectors.
#define FASTBN_CAPABILITY scalar
#define FASTBN_VECTOR_BYTES 0
#include "../loops_impl.h"
