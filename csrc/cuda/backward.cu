// SPDX-License-Identifier: BSD-3-Clause
#include "algorithms/one_block.cuh"
#include "algorithms/persistent.cuh"
#include "algorithms/two_pass.cuh"
#include "batch_norm.h"
#include "launcher.cuh"

namespace fastbn::cuda {

void backward(const Backward& op, const Plan& plan, const Workspace& workspace, void* stream) {
  if (plan.launches == 0) return;
  const Launcher launch(op.problem, plan, static_cast<gpu::Stream>(stream));
  with_mapping(op.problem.dtype, plan.geometry, [&](auto tag) {
    using Mapping = typename decltype(tag)::Type;
    if (op.steps == Steps::kApply) {
      launch("combine_backward_apply", combine_backward_apply<Mapping>, op, plan.geometry);
      return;
    }
    if (plan.algorithm == Algorithm::kElementwise) {
      launch("eval_backward", eval_backward<Mapping>, op, plan.geometry);
      return;
    }
    if (plan.algorithm == Algorithm::kOneBlock) {
      launch("one_block_backward", one_block_backward<Mapping>, op, plan.geometry);
      return;
    }
    if (is_persistent(plan.algorithm)) {
      if constexpr (Mapping::kPersistent) {
        launch("persistent_backward", persistent_backward<Mapping>, op, plan.geometry, workspace,
               launch.tile_maps(inputs(op), op.dx));
        return;
      }
      throw not_persistent(plan);
    }
    launch("two_pass_backward_reduce", two_pass_backward_reduce<Mapping>, op, plan.geometry,
           workspace);
    if (plan.launches == 2) {
      launch.then("two_pass_backward_apply", two_pass_backward_apply<Mapping>, op, plan.geometry,
                  workspace);
    }
  });
}

}  // namespace fastbn::cuda
