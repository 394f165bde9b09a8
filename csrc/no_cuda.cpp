// SPDX-License-Identifier: BSD-3-Clause
//
// What a build without CUDA answers for tensors on a GPU. Left out of builds that have it.
#include <torch/library.h>

namespace {

void refuse(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      false, op.schema().name(),
      " got a tensor on a GPU, but this fastbn was built without CUDA kernels and supports CPU "
      "tensors only; reinstall it with FASTBN_CUDA=1 pip install --no-build-isolation . where "
      "torch "
      "has CUDA and nvcc is at hand, or move the model to the CPU or back with fastbn.revert.");
}

}  // namespace

TORCH_LIBRARY_IMPL(fastbn, CUDA, library) {
  library.impl("batch_norm_training", torch::CppFunction::makeFromBoxedFunction<&refuse>());
  library.impl("batch_norm_inference", torch::CppFunction::makeFromBoxedFunction<&refuse>());
  library.impl("batch_norm_backward", torch::CppFunction::makeFromBoxedFunction<&refuse>());
}
