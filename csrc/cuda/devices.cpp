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
  // How many clusters run at once nobody publishes. Those of the H100 follow from a launch of
  // clusters of 8 that was seen to reach 120 of its 132 multiprocessors; the H200 is the same chip,
  // and the others are taken to lose as much. The backend asks the driver instead.
  constexpr std::array<int, kClusterSizes> kNone = {};
  // clang-format off
  static const std::vector<Device> devices = {
      {"t4", 7, 5, 40, 1024, 64 * kKiB, 64 * kKiB, 4 * kMiB, 320 * kGB, false, true, kNone},
      {"a100", 8, 0, 108, 2048, 163 * kKiB, 164 * kKiB, 40 * kMiB, 2039 * kGB, false, true, kNone},
      {"h100", 9, 0, 132, 2048, 227 * kKiB, 228 * kKiB, 50 * kMiB, 3350 * kGB, true, true,
       {132, 66, 31, 15, 7}},
      {"h200", 9, 0, 132, 2048, 227 * kKiB, 228 * kKiB, 60 * kMiB, 4800 * kGB, true, true,
       {132, 66, 31, 15, 7}},
      {"rtx4090", 8, 9, 128, 1536, 99 * kKiB, 100 * kKiB, 72 * kMiB, 1008 * kGB, false, true, kNone},
      {"rtx5090", 12, 0, 170, 1536, 99 * kKiB, 100 * kKiB, 96 * kMiB, 1792 * kGB, true, true,
       {170, 85, 40, 19, 0}},
      {"b200", 10, 0, 148, 2048, 227 * kKiB, 228 * kKiB, 126 * kMiB, 8000 * kGB, true, true,
       {148, 74, 35, 16, 8}},
  };
  // clang-format on
  return devices;
}

}  // namespace fastbn::cuda
