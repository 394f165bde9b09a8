// SPDX-License-Identifier: BSD-3-Clause
//
// Launch code with a CUDA runtime that fails as it is told. A program that returns 1 and names the
// first check that failed.
//   nvcc -std=c++17 -cudart none -o runtime main.cu runtime.cpp
#include <cstdio>
#include <functional>
#include <stdexcept>
#include <string>

#include "../../../csrc/cuda/gpu/launch.cuh"
#include "runtime.h"

namespace {

__global__ void kernel(int) {}
__global__ void other_kernel(int) {}

using namespace fastbn;
using runtime::state;

constexpr gpu::LaunchShape kShape = {1, 32, 0};
constexpr gpu::LaunchShape kCluster = {16, 32, 0, false, 16};

void check(bool passed, const char* what) {
  if (!passed) throw std::logic_error(what);
}

std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

void check_launches() {
  state.attributes_error = cudaErrorMemoryAllocation;
  for (int attempt = 0; attempt < 2; ++attempt) {
    const char* error = gpu::launch(nullptr, kShape, kernel, 1);
    check(error != nullptr && std::string(error) == "out of memory", "a failure is reported");
    check(state.last_error == cudaSuccess, "and not to others");
  }
  check(state.launches == 0, "a kernel that could not be loaded is not launched");
  state.attributes_error = cudaSuccess;
  check(gpu::launch(nullptr, kShape, kernel, 1) == nullptr && state.launches == 1,
        "a launch after one that failed works");
  const int questions_before = state.questions;
  check(gpu::launch(nullptr, kShape, kernel, 1) == nullptr && state.questions == questions_before,
        "the driver is asked once about a kernel");
  state.current_device = 1;
  check(
      gpu::launch(nullptr, kShape, kernel, 1) == nullptr && state.questions == questions_before + 1,
      "and again on another device");
}

void check_occupancy() {
  state.attributes_error = cudaErrorMemoryAllocation;
  const auto say = std::string("fastbn: asking what the GPU can run at once failed: out of memory");
  check(message_of([] { gpu::active_blocks(kShape, other_kernel); }) == say,
        "blocks that could not be counted are not none");
  check(message_of([] { gpu::active_clusters(kCluster, other_kernel); }) == say,
        "clusters that could not be counted are not none");
  check(message_of([] { gpu::is_code_for_hopper(other_kernel); }) == say,
        "code that could not be loaded is not old");
  check(state.last_error == cudaSuccess, "others do not get these errors");
  state.attributes_error = cudaSuccess;
  check(gpu::active_blocks(kShape, other_kernel) == 2, "blocks are counted later");
  check(gpu::active_clusters(kCluster, other_kernel) == 16, "clusters are counted later");
  check(gpu::is_code_for_hopper(other_kernel), "code is known later");
  state.clusters_error = cudaErrorInvalidClusterSize;
  check(gpu::active_clusters(kCluster, other_kernel) == 0, "a device may have no such clusters");
  check(state.last_error == cudaSuccess, "which is no error to others");
  state.clusters_error = cudaErrorMemoryAllocation;
  check(message_of([] { gpu::active_clusters(kCluster, other_kernel); }) == say,
        "which a lack of memory does not say");
}

}  // namespace

int main() {
  try {
    check_launches();
    check_occupancy();
  } catch (const std::logic_error& failed) {
    std::printf("failed: %s\n", failed.what());
    return 1;
  }
  return 0;
}
