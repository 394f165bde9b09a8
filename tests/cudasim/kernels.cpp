// SPDX-License-Identifier: BSD-3-Clause
//
// The kernels and their launch code, by a host compiler: FASTBN_SIMULATOR makes gpu/ take the
// simulator.
#include "../../csrc/cuda/backward.cu"
#include "../../csrc/cuda/forward.cu"
