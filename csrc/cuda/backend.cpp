// SPDX-License-Identifier: BSD-3-Clause
//
// The torch side of the CUDA backend: device, stream, memory, and what the planner asks of them.
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>

#include <atomic>
#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>

#include "../ops/registration.h"
#include "batch_norm.h"
#include "counters.h"
#include "device_query.h"
#include "planner/plan.h"
#include "planner/request.h"
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
  query_persistence(device);
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

  // Part of what is asked of the planner: plans made before stay in the cache, but no longer fit.
  void leave_free(int multiprocessors) { free_multiprocessors_ = multiprocessors; }

  Plan plan_for(Request request) {
    request.free_multiprocessors = free_multiprocessors_;
    constexpr size_t kMaxPlans = 4096;
    const Key key{c10::cuda::current_device(), request.key()};
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = plans_.find(key);
    if (found != plans_.end()) return found->second;
    if (plans_.size() == kMaxPlans) plans_.clear();  // shapes that never come back
    return plans_.emplace(key, make_plan(request)).first->second;
  }

 private:
  using Key = std::pair<int, decltype(std::declval<Request>().key())>;

  Planning() {
    const char* value = std::getenv("FASTBN_CUDA_ALGORITHM");
    if (value == nullptr || *value == 0) return;
    forced_ = current_name(value);
    if (forced_ != value) {
      TORCH_WARN("FASTBN_CUDA_ALGORITHM=", value, " is called ", forced_, " now");
    }
  }

  Plan make_plan(const Request& request) const {
    try {
      return plan(request, current_device(), forced_);
    } catch (const std::invalid_argument& error) {
      TORCH_CHECK_VALUE(false, forced_ == "auto" ? "" : "FASTBN_CUDA_ALGORITHM: ", error.what());
    }
  }

  std::atomic<int> free_multiprocessors_ = 0;
  std::mutex mutex_;
  std::string forced_ = "auto";
  std::map<Key, Plan> plans_;
};

Plan plan_for(const Request& request) { return Planning::instance().plan_for(request); }

// The memory of the current stream; see CallWorkspace.
class StreamMemory {
 public:
  cudaStream_t stream() const { return stream_.stream(); }

  bool is_capturing() const {
    return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
  }

  Counters* counters() const {
    static CounterSlots slots;
    // One that torch did not make, and that its maker may destroy: another may get the same handle
    // while its kernels run, or each thread have a stream of that handle.
    const bool external =
        stream_.id() != 0 && stream_.id() == reinterpret_cast<c10::StreamId>(stream());
    if (external) return nullptr;
    // Another stream of this thread may be capturing, in whose graph nothing of this belongs.
    const c10::cuda::CUDAStreamCaptureModeGuard guard(cudaStreamCaptureModeRelaxed);
    return slots.of(stream_.device_index(), stream_.id(), module_counters);
  }

  c10::DataPtr allocate(int64_t bytes) const {
    return c10::cuda::CUDACachingAllocator::get()->allocate(static_cast<size_t>(bytes));
  }

  void clear(void* data, int64_t bytes) const {
    C10_CUDA_CHECK(cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), stream()));
  }

 private:
  c10::cuda::CUDAStream stream_ = c10::cuda::getCurrentCUDAStream();
};

void training_forward(const TrainingForward& op) {
  const Plan plan = plan_for(request(op));
  StreamMemory memory;
  const CallWorkspace workspace(memory, plan);
  cuda::training_forward(op, plan, *workspace, memory.stream());
}

void eval_forward(const EvalForward& op) {
  const Plan plan = plan_for(request(op));
  cuda::eval_forward(op, plan, c10::cuda::getCurrentCUDAStream().stream());
}

void backward(const Backward& op) {
  const Plan plan = plan_for(request(op));
  StreamMemory memory;
  const CallWorkspace workspace(memory, plan);
  cuda::backward(op, plan, *workspace, memory.stream());
}

constexpr fastbn::Backend kBackend{training_forward, eval_forward, backward};

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

void leave_free(int multiprocessors) { Planning::instance().leave_free(multiprocessors); }

}  // namespace fastbn::cuda

TORCH_LIBRARY_IMPL(fastbn, CUDA, library) {
  fastbn::implement_operators<fastbn::cuda::kBackend>(library);
}
