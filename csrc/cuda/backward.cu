// SPDX-License-Identifier: BSD-3-Clause
#include "batch_norm.h"
#include "dispatch.cuh"
#include "kernels/onchip.cuh"
#include "kernels/split.cuh"
#include "kernels/tiny.cuh"

namespace fastbn::cuda {

void backward(const Backward& op, const Plan& plan, void* workspace, void* stream) {
  if (plan.launches == 0) return;
  const Launcher launch(op.problem, plan, static_cast<gpu::Stream>(stream));
  dispatch(op.problem.dtype, plan.geometry, [&](auto tag) {
    using Mapping = typename decltype(tag)::Type;
    using Epilogue = Identity<typename Mapping::acc_t>;
    const Epilogue epilogue;
    if (plan.algorithm == Algorithm::kElementwise) {
      launch("inference_gradient", inference_gradient<Mapping>, op, plan.geometry);
      return;
    }
    if (plan.algorithm == Algorithm::kTiny) {
      launch("tiny_backward", tiny_backward<Mapping, Epilogue>, op, plan.geometry, epilogue);
      return;
    }
    const Workspace arrays = place(plan, workspace);
    if (on_chip(plan.algorithm)) {
      if constexpr (Mapping::kHolds) {
        launch("onchip_backward", onchip_backward<Mapping, Epilogue>, op, plan.geometry, arrays,
               epilogue);
      }
      return;
    }
    launch("split_gradients", split_gradients<Mapping, Epilogue>, op, plan.geometry, arrays,
           epilogue);
    if (plan.launches == 2) {
      launch.then("split_differentiate", split_differentiate<Mapping, Epilogue>, op, plan.geometry,
                  arrays, epilogue);
    }
  });
}

}  // namespace fastbn::cuda
