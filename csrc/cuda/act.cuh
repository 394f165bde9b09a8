// SPDX-License-Identifier: BSD-3-Clause
//
// Launches of the kernels with an epilogue, for plans that have one. They are compiled apart from
// the others: there are as many, and compilers work on both at once.
#pragma once

#include "launcher.cuh"

namespace fastbn::cuda {

// forward_act.cu
void apply_forward_act(const Launcher& launch, const TrainingForward& op, const Plan& plan,
                       const Workspace& workspace);
void persistent_forward_act(const Launcher& launch, const TrainingForward& op, const Plan& plan,
                            const Workspace& workspace);
void eval_forward_act(const Launcher& launch, const EvalForward& op, const Plan& plan);

// backward_act.cu
void reduce_backward_act(const Launcher& launch, const Backward& op, const Plan& plan,
                         const Workspace& workspace);
void apply_backward_act(const Launcher& launch, const Backward& op, const Plan& plan,
                        const Workspace& workspace);
void persistent_backward_act(const Launcher& launch, const Backward& op, const Plan& plan,
                             const Workspace& workspace);

template <EpilogueKind kKind_>
struct KindTag {
  static constexpr EpilogueKind kKind = kKind_;
};

// Calls body(TypeTag<Mapping>(), KindTag<kKind>()) for what a plan with an epilogue is for, but for
// masks.
template <typename Body>
void with_epilogue(DType dtype, const Plan& plan, const Body& body) {
  with_mapping(dtype, plan.geometry, [&](auto mapping) {
    if (plan.epilogue == EpilogueKind::kResidual)
      return body(mapping, KindTag<EpilogueKind::kResidual>());
    return body(mapping, KindTag<EpilogueKind::kActivation>());
  });
}

// The same of backward. Masks are for whole vectors, as persistent kernels are.
template <typename Body>
void with_backward_epilogue(DType dtype, const Plan& plan, const Body& body) {
  if (plan.epilogue != EpilogueKind::kMask) return with_epilogue(dtype, plan, body);
  with_mapping(dtype, plan.geometry, [&](auto mapping) {
    if constexpr (decltype(mapping)::Type::kPersistent) {
      return body(mapping, KindTag<EpilogueKind::kMask>());
    }
    throw std::logic_error(std::string("fastbn: no kernels with masks over ") +
                           name(plan.geometry.mapping));
  });
}

}  // namespace fastbn::cuda
