// SPDX-License-Identifier: BSD-3-Clause
#include "act.cuh"
#include "algorithms/persistent.cuh"
#include "algorithms/two_pass.cuh"

namespace fastbn::cuda {

void reduce_backward_act(const Launcher& launch, const Backward& op, const Plan& plan,
                         const Workspace& workspace) {
  with_backward_epilogue(op.problem.dtype, plan, [&](auto mapping, auto kind) {
    using Mapping = typename decltype(mapping)::Type;
    constexpr EpilogueKind kKind = decltype(kind)::kKind;
    launch("two_pass_backward_reduce", two_pass_backward_reduce<Mapping, kKind>, op, plan.geometry,
           workspace);
  });
}

void apply_backward_act(const Launcher& launch, const Backward& op, const Plan& plan,
                        const Workspace& workspace) {
  with_backward_epilogue(op.problem.dtype, plan, [&](auto mapping, auto kind) {
    using Mapping = typename decltype(mapping)::Type;
    constexpr EpilogueKind kKind = decltype(kind)::kKind;
    launch.then("two_pass_backward_apply", two_pass_backward_apply<Mapping, kKind>, op,
                plan.geometry, workspace);
  });
}

void persistent_backward_act(const Launcher& launch, const Backward& op, const Plan& plan,
                             const Workspace& workspace) {
  with_backward_epilogue(op.problem.dtype, plan, [&](auto mapping, auto kind) {
    using Mapping = typename decltype(mapping)::Type;
    constexpr EpilogueKind kKind = decltype(kind)::kKind;
    if constexpr (Mapping::kPersistent) {
      launch("persistent_backward", persistent_backward<Mapping, kKind>, op, plan.geometry,
             workspace, launch.tile_maps(inputs<kKind>(op), op.dx));
      return;
    }
    throw not_persistent(plan);
  });
}

}  // namespace fastbn::cuda
