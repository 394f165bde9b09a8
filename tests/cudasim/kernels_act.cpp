// SPDX-License-Identifier: BSD-3-Clause
//
// Those of kernels.cpp that have an epilogue.
#include "../../csrc/cuda/backward_act.cu"
#include "../../csrc/cuda/forward_act.cu"
