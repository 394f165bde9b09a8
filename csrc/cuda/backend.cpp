// SPDX-License-Identifier: BSD-3-Clause
//
// The torch side of the CUDA backend: device, stream, memory, and what the planner asks of them.
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "../ops.h"
#include "batch_norm.h"
#include "device_properties.h"
#include "request.h"
#include "workspace.h"

namespace fastbn::cuda {

namespace {

Device query_device(int index) {
  cudaDeviceProp properties;
  C10_CUDA_CHECK(cudaGetDeviceProperties(&properties, index));
  int memory_kilohertz = 0, memory_bus_bits = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&memory_kilohertz, cudaDevAttrMemoryClockRate, index));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&memory_bus_bits, cudaDevAttrGlobalMemoryBusWidth, index));
  Device device;
  device.name = properties.name;
  device.major = properties.major;
  device.minor = properties.minor;
  device.multiprocessors = properties.multiProcessorCount;
  device.threads_per_multiprocessor = properties.maxThreadsPerMultiProcessor;
  device.shared_per_block = static_cast<int64_t>(properties.sharedMemPerBlockOptin);
  device.shared_per_multiprocessor = static_cast<int64_t>(properties.sharedMemPerMultiprocessor);
  device.l2_bytes = properties.l2CacheSize;
  device.bandwidth = 2.0 * memory_kilohertz * 1e3 * memory_bus_bits / 8;  // twice a clock
  return device;
}

const Device& current_device() { return device_properties(c10::cuda::current_device()); }

// For benchmarks: what FASTBN_CUDA_ALGORITHM says, read once.
const std::string& forced_algorithm() {
  static const std::string forced = [] {
    const char* value = std::getenv("FASTBN_CUDA_ALGORITHM");
    return std::string(value == nullptr || *value == 0 ? "auto" : value);
  }();
  return forced;
}

Plan plan_for(const Request& request) {
  try {
    return plan(request, current_device(), forced_algorithm());
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false,
                      forced_algorithm() == "auto" ? "" : "FASTBN_CUDA_ALGORITHM: ", error.what());
  }
}

void training_forward(const TrainingForward& op) {
  const Plan plan = plan_for(request(op));
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const WorkspaceLease workspace = lease_workspace(stream, plan.workspace_bytes);
  cuda::training_forward(op, plan, workspace.data, stream.stream());
}

void inference_forward(const InferenceForward& op) {
  const Plan plan = plan_for(request(op));
  cuda::inference_forward(op, plan, c10::cuda::getCurrentCUDAStream().stream());
}

void backward(const Backward& op) {
  const Plan plan = plan_for(request(op));
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const WorkspaceLease workspace = lease_workspace(stream, plan.workspace_bytes);
  cuda::backward(op, plan, workspace.data, stream.stream());
}

constexpr fastbn::Backend kBackend{training_forward, inference_forward, backward};

ThreeTensors training(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& running_mean, const OptionalTensor& running_var,
                      const OptionalTensor& num_batches_tracked, std::optional<double> momentum,
                      double eps) {
  const c10::DeviceGuard guard(x.device());
  return batch_norm_training(kBackend, x, weight, bias, running_mean, running_var,
                             num_batches_tracked, momentum, eps);
}

ThreeTensors inference(const at::Tensor& x, const OptionalTensor& weight,
                       const OptionalTensor& bias, const OptionalTensor& running_mean,
                       const OptionalTensor& running_var, double eps, bool save) {
  const c10::DeviceGuard guard(x.device());
  return batch_norm_inference(kBackend, x, weight, bias, running_mean, running_var, eps, save);
}

ThreeTensors gradient(const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& weight,
                      const at::Tensor& mean, const at::Tensor& invstd, bool training, bool want_dx,
                      bool want_dweight, bool want_dbias) {
  const c10::DeviceGuard guard(x.device());
  return batch_norm_backward(kBackend, dy, x, weight, mean, invstd, training, want_dx, want_dweight,
                             want_dbias);
}

}  // namespace

const Device& device_properties(int index) {
  static std::mutex mutex;
  static std::unordered_map<int, Device> devices;
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = devices.find(index);
  if (found == devices.end()) found = devices.emplace(index, query_device(index)).first;
  return found->second;
}

}  // namespace fastbn::cuda

TORCH_LIBRARY_IMPL(fastbn, CUDA, library) {
  library.impl("batch_norm_training", fastbn::cuda::training);
  library.impl("batch_norm_inference", fastbn::cuda::inference);
  library.impl("batch_norm_backward", fastbn::cuda::gradient);
}
