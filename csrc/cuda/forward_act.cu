// SPDX-License-Identifier: BSD-3-Clause
#include "act.cuh"
#include "algorithms/persistent.cuh"
#include "algorithms/two_pass.cuh"

namespace fastbn::cuda {

void apply_forward_act(const Launcher& launch, const TrainingForward& op, const Plan& plan,
                       const Workspace& workspace) {
  with_epilogue(op.problem.dtype, plan, [&](auto mapping, auto kind) {
    using Mapping = typename decltype(mapping)::Type;
    constexpr EpilogueKind kKind = decltype(kind)::kKind;
    launch.then("two_pass_forward_apply", two_pass_forward_apply<Mapping, kKind>, op, plan.geometry,
                workspace);
  });
}

void persistent_forward_act(const Launcher& launch, const TrainingForward& op, const Plan& plan,
                            const Workspace& workspace) {
  with_epilogue(op.problem.dtype, plan, [&](auto mapping, auto kind) {
    using Mapping = typename decltype(mapping)::Type;
    constexpr EpilogueKind kKind = decltype(kind)::kKind;
    if constexpr (Mapping::kPersistent) {
      launch("persistent_forward", persistent_forward<Mapping, kKind>, op, plan.geometry, workspace,
             launch.tile_maps(inputs<kKind>(op), op.y));
      return;
    }
    throw not_persistent(plan);
  });
}

void eval_forward_act(const Launcher& launch, const EvalForward& op, const Plan& plan) {
  with_epilogue(op.problem.dtype, plan, [&](auto mapping, auto kind) {
    using Mapping = typename decltype(mapping)::Type;
    launch("eval_forward", eval_forward<Mapping, decltype(kind)::kKind>, op, plan.geometry);
  });
}

}  // namespace fastbn::cuda
