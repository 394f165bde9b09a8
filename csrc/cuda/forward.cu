// SPDX-License-Identifier: BSD-3-Clause
#include <algorithm>

#include "batch_norm.h"
#include "dispatch.cuh"
#include "kernels/onchip.cuh"
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
    if (on_chip(plan.algorithm)) {
      if constexpr (Mapping::kHolds) {
        launch("onchip_forward", onchip_forward<Mapping, Epilogue>, op, plan.geometry, arrays,
               epilogue);
      }
      return;
    }
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

void query_residence(Device& device) {
  // All kernels that stay on chip have as many registers, threads and bytes of shared memory at
  // most: where one of these fits, all do.
  const auto kernel = onchip_forward<Segments<float, 4>, Identity<float>>;
  const gpu::LaunchShape whole{1, kMaxThreads, static_cast<int>(device.shared_per_block)};
  device.cooperative = device.cooperative && gpu::active_blocks(whole, kernel) >= kOnChipBlocks;
  device.copy_engine = device.major >= 9 && gpu::is_code_for_hopper(kernel);
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
