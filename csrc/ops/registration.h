// SPDX-License-Identifier: BSD-3-Clause
//
// Gives the table of operators in ops.h to PyTorch's dispatcher.
#pragma once

#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "ops.h"

namespace fastbn {

inline void define_operators(torch::Library& library) {
#define FASTBN_DEFINE(name, signature) library.def(#name signature);
  FASTBN_OPERATORS(FASTBN_DEFINE)
#undef FASTBN_DEFINE
}

// An operator computed by a backend, on the device of its first argument.
template <auto kOperator, const Backend& kBackend>
struct OnBackend;

template <typename Result, typename... Arguments,
          Result (*kOperator)(const Backend&, const at::Tensor&, Arguments...),
          const Backend& kBackend>
struct OnBackend<kOperator, kBackend> {
  static Result call(const at::Tensor& first, Arguments... arguments) {
    const c10::DeviceGuard guard(first.device());
    return kOperator(kBackend, first, arguments...);
  }
};

template <const Backend& kBackend>
void implement_operators(torch::Library& library) {
#define FASTBN_IMPLEMENT(name, signature) \
  library.impl(#name, OnBackend<&fastbn::name, kBackend>::call);
  FASTBN_OPERATORS(FASTBN_IMPLEMENT)
#undef FASTBN_IMPLEMENT
}

}  // namespace fastbn
