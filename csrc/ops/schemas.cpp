// SPDX-License-Identifier: BSD-3-Clause
//
// Defines the operators torch.ops.fastbn.*.
#include "registration.h"

TORCH_LIBRARY(fastbn, library) { fastbn::define_operators(library); }
