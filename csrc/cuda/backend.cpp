// SPDX-License-Identifier: BSD-3-Clause
//
// The torch side of the CUDA backend: device, stream, memory, and what the planner asks of them.
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>

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
  device.cooperative = properties.cooperativeLaunch != 0;
  const c10::DeviceGuard guard(c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(index)));
  query_residence(device);
  return device;
}

const Device& current_device() { return device_properties(c10::cuda::current_device()); }

// Planning takes microseconds, and a model asks the same few questions again and again.
class Planning {
 public:
  static Planning& instance() {
    static Planning planning;
    return planning;
  }

  void force(std::string algorithm) {
    const std::lock_guard<std::mutex> lock(mutex_);
    forced_ = std::move(algorithm);
    plans_.clear();
  }

  Plan plan_for(const Request& request) {
    constexpr size_t kMostPlans = 4096;
    const Problem& problem = request.problem;
    const Key key(c10::cuda::current_device(), request.operation, problem.dtype, problem.layout,
                  problem.batch, problem.channels, problem.spatial, request.aligned,
                  request.cumulative, request.training, request.want_dx, request.want_sums);
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = plans_.find(key);
    if (found != plans_.end()) return found->second;
    if (plans_.size() == kMostPlans) plans_.clear();  // shapes that never come back
    return plans_.emplace(key, make_plan(request)).first->second;
  }

 private:
  using Key = std::tuple<int, Operation, DType, Layout, int64_t, int64_t, int64_t, bool, bool, bool,
                         bool, bool>;

  Planning() {
    const char* value = std::getenv("FASTBN_CUDA_ALGORITHM");
    if (value != nullptr && *value != 0) forced_ = value;
  }

  Plan make_plan(const Request& request) const {
    try {
      return plan(request, current_device(), forced_);
    } catch (const std::invalid_argument& error) {
      TORCH_CHECK_VALUE(false, forced_ == "auto" ? "" : "FASTBN_CUDA_ALGORITHM: ", error.what());
    }
  }

  std::mutex mutex_;
  std::string forced_ = "auto";
  std::map<Key, Plan> plans_;
};

Plan plan_for(const Request& request) { return Planning::instance().plan_for(request); }

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

void force_algorithm(const std::string& name) { Planning::instance().force(name); }

}  // namespace fastbn::cuda

TORCH_LIBRARY_IMPL(fastbn, CUDA, library) {
  library.impl("batch_norm_training", fastbn::cuda::training);
  library.impl("batch_norm_inference", fastbn::cuda::inference);
  library.impl("batch_norm_backward", fastbn::cuda::gradient);
}
