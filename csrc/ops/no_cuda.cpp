// SPDX-License-Identifier: BSD-3-Clause
//
// What a build without CUDA answers for tensors on a GPU. Left out of builds that have it.
#include "../cuda/device_query.h"
#include "registration.h"

namespace fastbn {

namespace {

constexpr const char* kHowToGetIt =
    "reinstall it with FASTBN_CUDA=1 pip install --no-build-isolation . where torch has CUDA and "
    "nvcc is at hand";

void refuse(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      false, op.schema().name(),
      " got a tensor on a GPU, but this fastbn was built without CUDA kernels and supports CPU "
      "tensors only; ",
      kHowToGetIt, ", or move the model to the CPU or back with fastbn.revert.");
}

}  // namespace

const cuda::Device& cuda::device_properties(int index) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, "the properties of GPU ", index,
                              " were asked for, but this fastbn was built without CUDA kernels; ",
                              kHowToGetIt);
}

void cuda::force_algorithm(const std::string& name) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, "algorithm '", name,
                              "' cannot be forced: this fastbn was built without CUDA kernels; ",
                              kHowToGetIt);
}

void cuda::leave_free(int) {}  // nothing is planned to run

}  // namespace fastbn

TORCH_LIBRARY_IMPL(fastbn, CUDA, library) {
#define FASTBN_REFUSE(name, signature) \
  library.impl(#name, torch::CppFunction::makeFromBoxedFunction<&fastbn::refuse>());
  FASTBN_OPERATORS(FASTBN_REFUSE)
#undef FASTBN_REFUSE
}
