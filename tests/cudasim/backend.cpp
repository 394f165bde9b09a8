// SPDX-License-Identifier: BSD-3-Clause
//
// The CUDA backend on the simulated GPU: operators torch.ops.fastbn_cudasim.* on CPU tensors that
// go through the checks, the planner, the launch code and the kernels of the real one.
#include <algorithm>
#include <sstream>
#include <type_traits>
#include <utility>

#include "../../csrc/core/mask.h"
#include "../../csrc/core/partial_rows.h"
#include "../../csrc/cuda/batch_norm.h"
#include "../../csrc/cuda/planner/plan.h"
#include "../../csrc/cuda/planner/request.h"
#include "../../csrc/cuda/workspace.h"
#include "../../csrc/ops/registration.h"
#include "cudasim/cudasim.h"
#include "stream_memory.h"

namespace fastbn::cudasim {

namespace {

using cuda::Plan;
using cuda::Request;

cuda::Device planned_device;
std::string forced_algorithm = "auto";
Plan last_plan;

// --- Buffers -------------------------------------------------------------------------------------

template <typename Data>
void add(const char* name, const Problem& problem, const Activation<Data>& activation) {
  if (activation.data == nullptr) return;
  register_buffer(activation.data, extent_bytes(problem, activation), name, Kind::kActivation,
                  /*writable=*/!std::is_const_v<Data>);
}

template <typename Data>
void add(const char* name, const Problem& problem, const ChannelVector<Data>& vector) {
  if (vector.data == nullptr) return;
  const int64_t bytes = ((problem.channels - 1) * vector.stride + 1) * element_size(vector.dtype);
  register_buffer(vector.data, bytes, name, Kind::kVector, /*writable=*/!std::is_const_v<Data>);
}

template <typename T>
void add(const char* name, T* numbers, int64_t count) {
  if (numbers == nullptr) return;
  register_buffer(numbers, count * static_cast<int64_t>(sizeof(T)), name, Kind::kVector,
                  /*writable=*/!std::is_const_v<T>);
}

// Counted as an activation: it has bits of each element.
template <typename Byte>
void add_mask(const Problem& problem, Byte* mask) {
  if (mask == nullptr) return;
  register_buffer(mask, mask_bytes(problem), "mask", Kind::kActivation,
                  /*writable=*/!std::is_const_v<Byte>);
}

void add(const PartialRows& partials, int64_t row_length) {
  add("partials", partials.out, partials.rows * row_length);
  add("partials", partials.in, partials.rows * row_length);
}

// --- Backend -------------------------------------------------------------------------------------

Plan plan(const Request& request) {
  last_plan = cuda::plan(request, planned_device, forced_algorithm);
  return last_plan;
}

// Calls launch(workspace), and checks that it leaves nothing behind.
template <typename Launch>
void with_workspace(const Plan& plan, const Launch& launch) {
  StreamMemory memory;
  launch(*cuda::CallWorkspace(memory, plan));
  memory.check_end_of_call();
}

// The buffers that both forwards have.
template <typename Forward>
void add_forward(const Forward& op) {
  const Problem& problem = op.problem;
  clear_buffers();
  add("x", problem, op.x);
  add("y", problem, op.y);
  add("residual", problem, op.epilogue.residual);
  add_mask(problem, op.epilogue.mask_out);
  add("weight", problem, op.weight);
  add("bias", problem, op.bias);
  add("mean", problem, op.mean);
  add("invstd", problem, op.invstd);
}

void training_forward(const TrainingForward& op) {
  add_forward(op);
  add("running_mean", op.problem, op.running.mean);
  add("running_var", op.problem, op.running.var);
  add("num_batches_tracked", op.running.num_batches_tracked, 1);
  add("total_count", op.total_count, 1);
  add(op.partials, moments_row_length(op.problem.channels));
  const Plan planned = plan(cuda::request(op));
  with_workspace(planned, [&](const cuda::Workspace& workspace) {
    cuda::training_forward(op, planned, workspace, nullptr);
  });
}

void eval_forward(const EvalForward& op) {
  add_forward(op);
  add("running_mean", op.problem, op.running_mean);
  add("running_var", op.problem, op.running_var);
  add("saved mean", op.problem, op.saved.mean);
  add("saved invstd", op.problem, op.saved.invstd);
  cuda::eval_forward(op, plan(cuda::request(op)), nullptr);
}

void backward(const Backward& op) {
  const Problem& problem = op.problem;
  clear_buffers();
  add("dy", problem, op.dy);
  add("x", problem, op.x);
  add("dx", problem, op.dx);
  add("residual", problem, op.epilogue.residual);
  add_mask(problem, op.epilogue.mask);
  add("dresidual", problem, op.dresidual);
  add("weight", problem, op.weight);
  add("bias", problem, op.bias);
  add("mean", problem, op.mean);
  add("invstd", problem, op.invstd);
  add("dweight", problem, op.dweight);
  add("dbias", problem, op.dbias);
  add("total_count", op.total_count, 1);
  add(op.partials, grad_sums_row_length(problem.channels));
  const Plan planned = plan(cuda::request(op));
  with_workspace(planned, [&](const cuda::Workspace& workspace) {
    cuda::backward(op, planned, workspace, nullptr);
  });
}

constexpr Backend kBackend{training_forward, eval_forward, backward};

// --- Operators -----------------------------------------------------------------------------------

// The schedule, the device to plan for and to simulate, and the algorithm. With fewer
// multiprocessors and less shared memory to a block than the device has, unless they are 0: small
// tensors then do what large ones do.
void configure(int64_t schedule, const std::string& device_name, const std::string& algorithm,
               int64_t multiprocessors, int64_t shared_bytes) {
  seed(static_cast<uint64_t>(schedule));
  forced_algorithm = algorithm;
  const auto& known = cuda::known_devices();
  const auto found = std::find_if(known.begin(), known.end(), [&](const cuda::Device& device) {
    return device.name == device_name;
  });
  TORCH_CHECK_VALUE(found != known.end(), "there is no device '", device_name, "' to simulate");
  planned_device = *found;
  if (multiprocessors > 0) {
    const double share = static_cast<double>(multiprocessors) / planned_device.multiprocessors;
    for (int& clusters : planned_device.clusters) clusters = static_cast<int>(clusters * share);
    planned_device.bandwidth *= share;
    planned_device.l2_bytes = static_cast<int64_t>(planned_device.l2_bytes * share);
    planned_device.multiprocessors = static_cast<int>(multiprocessors);
  }
  if (shared_bytes > 0) {
    planned_device.shared_per_multiprocessor += shared_bytes - planned_device.shared_per_block;
    planned_device.shared_per_block = shared_bytes;
  }
  Device& simulated = device();
  simulated.multiprocessors = planned_device.multiprocessors;
  simulated.threads_per_multiprocessor = planned_device.threads_per_multiprocessor;
  simulated.shared_per_multiprocessor = static_cast<int>(planned_device.shared_per_multiprocessor);
  simulated.shared_per_block = static_cast<int>(planned_device.shared_per_block);
  simulated.clusters = planned_device.clusters;
  simulated.clusters[0] = simulated.multiprocessors;
  // What the backend asks the driver, the simulator answers.
  cuda::query_persistence(planned_device);
}

// The stream that the following calls run on, or whose graph they are captured for.
void use_stream(int64_t id, bool capturing) { StreamMemory::current() = {id, capturing}; }

std::string json(const std::array<int64_t, 5>& histogram) {
  std::ostringstream text;
  const char* separator = "";
  text << "{";
  for (size_t i = 0; i < histogram.size(); ++i) {
    if (histogram[i] == 0) continue;
    text << separator << '"' << (1 << i) << "\": " << histogram[i];
    separator = ", ";
  }
  text << "}";
  return text.str();
}

std::string json(const Traffic& traffic) {
  std::ostringstream text;
  text << "{\"read_bytes\": " << traffic.read_bytes()
       << ", \"written_bytes\": " << traffic.written_bytes()
       << ", \"loads\": " << json(traffic.loads) << ", \"stores\": " << json(traffic.stores)
       << ", \"box_copies\": " << traffic.box_copies << ", \"box_stores\": " << traffic.box_stores
       << ", \"bulk_copies\": " << traffic.bulk_copies << ", \"bulk_bytes\": " << traffic.bulk_bytes
       << ", \"bulk_stores\": " << traffic.bulk_stores
       << ", \"bulk_stored_bytes\": " << traffic.bulk_stored_bytes
       << ", \"atomics\": " << traffic.atomics << "}";
  return text.str();
}

// What was launched since the last report, as JSON.
std::string report() {
  const Report report = take_report();
  std::ostringstream text;
  text << "{\"algorithm\": \"" << cuda::name(last_plan.algorithm) << "\", \"mapping\": \""
       << cuda::name(last_plan.geometry.mapping) << "\", \"launches\": [";
  const char* separator = "";
  for (const LaunchReport& launch : report.launches) {
    text << separator << "{\"blocks\": " << launch.blocks << ", \"threads\": " << launch.threads
         << ", \"shared_bytes\": " << launch.shared_bytes << ", \"barriers\": " << launch.barriers
         << ", \"cluster\": " << launch.cluster_blocks
         << ", \"cluster_barriers\": " << launch.cluster_barriers
         << ", \"cooperative\": " << (launch.cooperative ? "true" : "false")
         << ", \"overlaps_previous\": " << (launch.overlaps_previous ? "true" : "false") << "}";
    separator = ", ";
  }
  text << "], \"planned\": {\"read_bytes\": " << last_plan.bytes_read
       << ", \"written_bytes\": " << last_plan.bytes_written << "}"
       << ", \"activations\": " << json(report.of(Kind::kActivation))
       << ", \"vectors\": " << json(report.of(Kind::kVector))
       << ", \"workspace\": " << json(report.of(Kind::kWorkspace));
  const MemoryReport memory = std::exchange(StreamMemory::report(), {});
  text << ", \"allocations\": [";
  separator = "";
  for (const int64_t bytes : memory.allocations) {
    text << separator << bytes;
    separator = ", ";
  }
  text << "], \"cleared_bytes\": " << memory.cleared_bytes << "}";
  return text.str();
}

}  // namespace

}  // namespace fastbn::cudasim

TORCH_LIBRARY(fastbn_cudasim, library) {
  fastbn::define_operators(library);
  library.def(
      "configure(int schedule, str device, str algorithm, int multiprocessors, int shared_bytes) "
      "-> ()",
      fastbn::cudasim::configure);
  library.def("use_stream(int id, bool capturing) -> ()", fastbn::cudasim::use_stream);
  library.def("report() -> str", fastbn::cudasim::report);
}

TORCH_LIBRARY_IMPL(fastbn_cudasim, CPU, library) {
  fastbn::implement_operators<fastbn::cudasim::kBackend>(library);
}
