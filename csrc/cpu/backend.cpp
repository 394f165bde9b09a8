// SPDX-License-Identifier: BSD-3-Clause
//
// The torch side of the C++ backend.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "../ops.h"
#include "batch_norm.h"
#include "parallel.h"

namespace fastbn::cpu {

// Fewer elements than this are done before another thread would have started.
constexpr int64_t kElementsPerThread = 32 << 10;

void parallel_for(int64_t tasks, int64_t elements_per_task,
                  const std::function<void(int64_t, int64_t)>& body) {
  const int64_t grain = (kElementsPerThread + elements_per_task) / (elements_per_task + 1);
  at::parallel_for(0, tasks, grain, body);
}

int num_threads() { return at::get_num_threads(); }

namespace {

constexpr Backend kBackend{training_forward, inference_forward, backward};

ThreeTensors training(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& running_mean, const OptionalTensor& running_var,
                      const OptionalTensor& num_batches_tracked, std::optional<double> momentum,
                      double eps) {
  return batch_norm_training(kBackend, x, weight, bias, running_mean, running_var,
                             num_batches_tracked, momentum, eps);
}

ThreeTensors inference(const at::Tensor& x, const OptionalTensor& weight,
                       const OptionalTensor& bias, const OptionalTensor& running_mean,
                       const OptionalTensor& running_var, double eps, bool save) {
  return batch_norm_inference(kBackend, x, weight, bias, running_mean, running_var, eps, save);
}

ThreeTensors gradient(const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& weight,
                      const at::Tensor& mean, const at::Tensor& invstd, bool training, bool want_dx,
                      bool want_dweight, bool want_dbias) {
  return batch_norm_backward(kBackend, dy, x, weight, mean, invstd, training, want_dx, want_dweight,
                             want_dbias);
}

}  // namespace

}  // namespace fastbn::cpu

TORCH_LIBRARY_IMPL(fastbn, CPU, library) {
  library.impl("batch_norm_training", fastbn::cpu::training);
  library.impl("batch_norm_inference", fastbn::cpu::inference);
  library.impl("batch_norm_backward", fastbn::cpu::gradient);
}
