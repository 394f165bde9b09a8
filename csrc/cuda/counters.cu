// SPDX-License-Identifier: BSD-3-Clause
#include <stdexcept>
#include <string>

#include "counters.h"

namespace fastbn::cuda {

namespace {

// Zero once the module is loaded.
__device__ Counters slots[kCounterSlots];

}  // namespace

Counters* module_counters() {
  void* address = nullptr;
  const cudaError_t error = cudaGetSymbolAddress(&address, slots);
  if (error == cudaSuccess) return static_cast<Counters*>(address);
  cudaGetLastError();  // reported here, and not to whoever asks next
  throw std::runtime_error(std::string("fastbn: loading the CUDA module failed: ") +
                           cudaGetErrorString(error));
}

}  // namespace fastbn::cuda
