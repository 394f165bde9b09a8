// SPDX-License-Identifier: BSD-3-Clause
//
// Devices by what their makers publish: NVIDIA's architecture whitepapers and data sheets, and the
// table of technical specifications per compute capability in the CUDA C++ programming guide.
#include "plan.h"

namespace fastbn::cuda {

namespace {

// How many clusters run at once nobody publishes. Those of the H100 follow from a launch of
// clusters of 8 that was seen to reach 120 of its 132 multiprocessors; the H200 is the same chip,
// and the others are taken to lose as much. With two blocks to a multiprocessor twice as many are
// counted on, though blocks of one cluster might share it, too. The backend asks the driver
// instead.
Device with_clusters(Device device, const std::array<int, kClusterSizes>& clusters) {
  device.cooperative = true;
  device.copy_engine = device.is_hopper_or_later();
  device.clusters = clusters;
  for (size_t size = 0; size < kClusterSizes; ++size)
    device.half_clusters[size] = 2 * clusters[size];
  return device;
}

}  // namespace

const std::vector<Device>& known_devices() {
  constexpr int64_t kKiB = 1 << 10;
  constexpr int64_t kMiB = 1 << 20;
  constexpr double kGB = 1e9;
  // clang-format off
  static const std::vector<Device> devices = {
      with_clusters({"t4", 7, 5, 40, 1024, 64 * kKiB, 64 * kKiB, 4 * kMiB, 320 * kGB}, {}),
      with_clusters({"a100", 8, 0, 108, 2048, 163 * kKiB, 164 * kKiB, 40 * kMiB, 2039 * kGB}, {}),
      with_clusters({"h100", 9, 0, 132, 2048, 227 * kKiB, 228 * kKiB, 50 * kMiB, 3350 * kGB},
                    {132, 66, 31, 15, 7}),
      with_clusters({"h200", 9, 0, 132, 2048, 227 * kKiB, 228 * kKiB, 60 * kMiB, 4800 * kGB},
                    {132, 66, 31, 15, 7}),
      with_clusters({"rtx4090", 8, 9, 128, 1536, 99 * kKiB, 100 * kKiB, 72 * kMiB, 1008 * kGB}, {}),
      with_clusters({"rtx5090", 12, 0, 170, 1536, 99 * kKiB, 100 * kKiB, 96 * kMiB, 1792 * kGB},
                    {170, 85, 40, 19, 0}),
      with_clusters({"b200", 10, 0, 148, 2048, 227 * kKiB, 228 * kKiB, 126 * kMiB, 8000 * kGB},
                    {148, 74, 35, 16, 8}),
  };
  // clang-format on
  return devices;
}

}  // namespace fastbn::cuda
