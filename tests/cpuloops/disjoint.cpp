// SPDX-License-Identifier: BSD-3-Clause
//
// disjoint(), what the loops demand of their callers.
#include <cstdint>
#include <string>
#include <vector>

#include "../../csrc/core/problem.h"
#include "check.h"
#include "tests.h"

namespace fastbn::cpuloops {

namespace {

// One of two activations of 2 samples, 3 channels and 5 * 7 positions with room between rows.
template <typename Data>
Activation<Data> activation_at(Data* data) {
  Activation<Data> activation;
  activation.data = data;
  activation.batch_stride = 400;
  activation.channel_stride = 100;
  activation.spatial_dims = 2;
  activation.sizes[0] = 5;
  activation.sizes[1] = 7;
  activation.strides[0] = 10;
  activation.strides[1] = 1;
  return activation;
}

}  // namespace

bool disjoint_passes() {
  Check check("disjoint");
  for (const DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    const int64_t size = element_size(dtype);
    const int64_t extent = 400 + 2 * 100 + 4 * 10 + 6 + 1;
    std::vector<char> memory(3 * extent * size);
    char* middle = memory.data() + extent * size;
    Problem problem;
    problem.dtype = dtype;
    problem.layout = Layout::kGeneric;
    problem.batch = 2;
    problem.channels = 3;
    problem.spatial = 35;
    const auto apart = [&](char* output, const char* input) {
      return disjoint(problem, activation_at<void>(output), activation_at<const void>(input));
    };
    check.on("disjoint", {2, extent, extent}, std::to_string(size) + " bytes");
    check.is_true(extent_bytes(problem, activation_at<void>(middle)) == extent * size, "extent");
    check.is_true(!apart(middle, middle), "itself");
    check.is_true(apart(nullptr, middle), "no output");
    for (int64_t shift = -extent; shift <= extent; ++shift) {
      const bool touches = shift > -extent && shift < extent;
      check.is_true(apart(middle, middle + shift * size) != touches, "input behind", shift);
      check.is_true(apart(middle + shift * size, middle) != touches, "output behind", shift);
    }
    problem.batch = 0;
    check.is_true(extent_bytes(problem, activation_at<void>(middle)) == 0, "extent of nothing");
    check.is_true(apart(middle, middle), "nothing");
  }
  return check.report();
}

}  // namespace fastbn::cpuloops
