// SPDX-License-Identifier: BSD-3-Clause
//
// Devices by what their makers publish: NVIDIA's architecture whitepapers and data sheets, and the
// table of technical specifications per compute capability in the CUDA C++ programming guide.
#include "plan.h"

namespace fastbn::cuda {

const std::vector<Device>& known_devices() {
  constexpr int64_t kKiB = 1 << 10;
  constexpr int64_t kMiB = 1 << 20;
  constexpr double kGB = 1e9;
  static const std::vector<Device> devices = {
      {"t4", 7, 5, 40, 1024, 64 * kKiB, 64 * kKiB, 4 * kMiB, 320 * kGB},
      {"a100", 8, 0, 108, 2048, 163 * kKiB, 164 * kKiB, 40 * kMiB, 2039 * kGB},
      {"h100", 9, 0, 132, 2048, 227 * kKiB, 228 * kKiB, 50 * kMiB, 3350 * kGB},
      {"h200", 9, 0, 132, 2048, 227 * kKiB, 228 * kKiB, 60 * kMiB, 4800 * kGB},
      {"rtx4090", 8, 9, 128, 1536, 99 * kKiB, 100 * kKiB, 72 * kMiB, 1008 * kGB},
      {"rtx5090", 12, 0, 170, 1536, 99 * kKiB, 100 * kKiB, 96 * kMiB, 1792 * kGB},
      {"b200", 10, 0, 148, 2048, 227 * kKiB, 228 * kKiB, 126 * kMiB, 8000 * kGB},
  };
  return devices;
}

}  // namespace fastbn::cuda
