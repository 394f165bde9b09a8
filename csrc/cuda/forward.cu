// SPDX-License-Identifier: BSD-3-Clause
#include <algorithm>

#include "act.cuh"
#include "algorithms/one_block.cuh"
#include "algorithms/persistent.cuh"
#include "algorithms/two_pass.cuh"
#include "batch_norm.h"
#include "launcher.cuh"

namespace fastbn::cuda {

void training_forward(const TrainingForward& op, const Plan& plan, const Workspace& workspace,
                      void* stream) {
  const Launcher launch(op.problem, plan, static_cast<gpu::Stream>(stream));
  with_mapping(op.problem.dtype, plan.geometry, [&](auto tag) {
    using Mapping = typename decltype(tag)::Type;
    if (op.steps == Steps::kApply) {
      launch("combine_forward_apply", combine_forward_apply<Mapping>, op, plan.geometry);
      return;
    }
    if (plan.algorithm == Algorithm::kOneBlock) {
      launch("one_block_forward", one_block_forward<Mapping>, op, plan.geometry);
      return;
    }
    if (is_persistent(plan.algorithm)) {
      if constexpr (Mapping::kPersistent) {
        if (plan.epilogue != EpilogueKind::kNone) {
          persistent_forward_act(launch, op, plan, workspace);
          return;
        }
        launch("persistent_forward", persistent_forward<Mapping, EpilogueKind::kNone>, op,
               plan.geometry, workspace, launch.tile_maps(inputs<EpilogueKind::kNone>(op), op.y));
        return;
      }
      throw not_persistent(plan);
    }
    launch("two_pass_forward_reduce", two_pass_forward_reduce<Mapping>, op, plan.geometry,
           workspace);
    if (op.steps == Steps::kReduce) return;
    if (plan.epilogue != EpilogueKind::kNone) {
      apply_forward_act(launch, op, plan, workspace);
      return;
    }
    launch.then("two_pass_forward_apply", two_pass_forward_apply<Mapping, EpilogueKind::kNone>, op,
                plan.geometry, workspace);
  });
}

void eval_forward(const EvalForward& op, const Plan& plan, void* stream) {
  const Launcher launch(op.problem, plan, static_cast<gpu::Stream>(stream));
  if (plan.epilogue != EpilogueKind::kNone) {
    eval_forward_act(launch, op, plan);
    return;
  }
  with_mapping(op.problem.dtype, plan.geometry, [&](auto tag) {
    using Mapping = typename decltype(tag)::Type;
    launch("eval_forward", eval_forward<Mapping, EpilogueKind::kNone>, op, plan.geometry);
  });
}

void query_persistence(Device& device) {
  // All persistent kernels have as many registers, threads and bytes of shared memory at most:
  // where one of these fits, all do.
  const auto kernel = persistent_forward<Contiguous<float, 4>, EpilogueKind::kNone>;
  const gpu::LaunchShape whole{1, kMaxThreads, static_cast<int>(device.shared_per_block)};
  device.cooperative = device.cooperative && gpu::active_blocks(whole, kernel) >= kPersistentBlocks;
  device.copy_engine = device.is_hopper_or_later() && gpu::is_code_for_hopper(kernel);
  device.clusters = {};
  device.half_clusters = {};
  if (!device.copy_engine) return;
  const int64_t half_shared =
      std::min(device.shared_per_block, device.shared_per_multiprocessor / 2 - kReservedShared);
  const gpu::LaunchShape half{1, kMaxThreads / 2, static_cast<int>(half_shared)};
  const auto count = [&](gpu::LaunchShape shape, int blocks) {
    shape.blocks = blocks;
    shape.cluster_blocks = blocks;
    return gpu::active_clusters(shape, kernel);
  };
  device.clusters[0] = device.multiprocessors;
  device.half_clusters[0] = 2 * device.multiprocessors;
  for (size_t size = 1; size < kClusterSizes; ++size) {
    device.clusters[size] = count(whole, 1 << size);
    device.half_clusters[size] = count(half, 1 << size);
  }
}

}  // namespace fastbn::cuda
