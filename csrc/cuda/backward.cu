// SPDX-License-Identifier: BSD-3-Clause
#include "act.cuh"
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
        if (plan.epilogue != EpilogueKind::kNone) {
          persistent_backward_act(launch, op, plan, workspace);
          return;
        }
        launch("persistent_backward", persistent_backward<Mapping, EpilogueKind::kNone>, op,
               plan.geometry, workspace, launch.tile_maps(inputs<EpilogueKind::kNone>(op), op.dx));
        return;
      }
      throw not_persistent(plan);
    }
    Backward to_apply = op;
    if (plan.epilogue != EpilogueKind::kNone) {
      reduce_backward_act(launch, op, plan, workspace);
      if (plan.launches == 1) return;
      if (op.dresidual.data == nullptr) {
        apply_backward_act(launch, op, plan, workspace);
        return;
      }
      to_apply.dy = op.dresidual;
    } else {
      launch("two_pass_backward_reduce", two_pass_backward_reduce<Mapping, EpilogueKind::kNone>, op,
             plan.geometry, workspace);
      if (plan.launches == 1) return;
    }
    launch.then("two_pass_backward_apply", two_pass_backward_apply<Mapping, EpilogueKind::kNone>,
                to_apply, plan.geometry, workspace);
  });
}

}  // namespace fastbn::cuda
