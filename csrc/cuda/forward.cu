// SPDX-License-Identifier: BSD-3-Clause
#include "batch_norm.h"
#include "dispatch.cuh"
#include "kernels/split.cuh"
#include "kernels/tiny.cuh"

namespace fastbn::cuda {

void training_forward(const TrainingForward& op, const Plan& plan, void* workspace, void* stream) {
  const Launcher launch(op.problem, plan, static_cast<gpu::Stream>(stream));
  dispatch(op.problem.dtype, plan.geometry, [&](auto tag) {
    using Mapping = typename decltype(tag)::Type;
    using Epilogue = Identity<typename Mapping::acc_t>;
    const Epilogue epilogue;
    if (plan.algorithm == Algorithm::kTiny) {
      launch("tiny_forward", tiny_forward<Mapping, Epilogue>, op, plan.geometry, epilogue);
      return;
    }
    const Workspace arrays = place(plan, workspace);
    launch("split_statistics", split_statistics<Mapping>, op, plan.geometry, arrays);
    launch.then("split_normalise", split_normalise<Mapping, Epilogue>, op, plan.geometry, arrays,
                epilogue);
  });
}

void inference_forward(const InferenceForward& op, const Plan& plan, void* stream) {
  const Launcher launch(op.problem, plan, static_cast<gpu::Stream>(stream));
  dispatch(op.problem.dtype, plan.geometry, [&](auto tag) {
    using Mapping = typename decltype(tag)::Type;
    using Epilogue = Identity<typename Mapping::acc_t>;
    launch("inference", inference<Mapping, Epilogue>, op, plan.geometry, Epilogue());
  });
}

}  // namespace fastbn::cuda
