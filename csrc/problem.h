// SPDX-License-Identifier: BSD-3-Clause
//
// What every backend is asked to compute, in plain structs: no torch, no CUDA.
//
// N is the batch, C the channels and S the spatial positions of one sample (L, H*W or D*H*W; 1 for
// a matrix). Statistics are taken over the N*S elements of a channel.
#pragma once

#include <cstdint>

namespace fastbn {

enum class DType : int8_t { kFloat64, kFloat32, kBFloat16, kFloat16 };

// Storage of the 16-bit types; arithmetic happens in float.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

constexpr int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    default:
      return 2;
  }
}

// The type of sums and saved statistics: float64 for float64, float32 for everything else.
constexpr DType accumulate_dtype(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

// How the elements of all activations of a problem lie in memory.
enum class Layout : int8_t {
  kNCS,      // contiguous: the positions of one channel of one sample are adjacent
  kNSC,      // channels last, and any (N, C) matrix: the channels of one position are adjacent
  kStrided,  // anything else
};

// Spatial dimensions of an activation after adjacent ones have been merged.
constexpr int kMaxSpatialDims = 8;

// An activation tensor. Strides count elements.
struct Activation {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t channel_stride = 0;
  int spatial_dims = 0;
  int64_t sizes[kMaxSpatialDims] = {};
  int64_t strides[kMaxSpatialDims] = {};
};

// One value per channel; `data` is null where the caller gave none.
struct ChannelVector {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t stride = 1;
};

struct Problem {
  DType dtype = DType::kFloat32;  // of the activations
  Layout layout = Layout::kNCS;
  int64_t batch = 0;
  int64_t channels = 0;
  int64_t spatial = 0;

  int64_t per_channel() const { return batch * spatial; }
};

// y = (x - mean) * invstd * weight + bias with the statistics of x, which are also written to
// `mean` and `invstd` and blended into the running statistics.
struct TrainingForward {
  Problem problem;
  Activation x, y;
  ChannelVector weight, bias;
  ChannelVector running_mean, running_var;  // updated; both or neither
  int64_t* num_batches_tracked = nullptr;   // incremented when given
  bool cumulative = false;                  // momentum = 1 / num_batches_tracked
  double momentum = 0;
  double eps = 0;
  ChannelVector mean, invstd;  // written; accumulate_dtype
};

// The same with given statistics; `mean` and `invstd` are written when they are not null.
struct InferenceForward {
  Problem problem;
  Activation x, y;
  ChannelVector weight, bias;
  ChannelVector running_mean, running_var;
  double eps = 0;
  ChannelVector mean, invstd;
};

// Gradients of either forward; those whose pointer is null are not wanted.
struct Backward {
  Problem problem;
  bool training = true;  // the statistics are functions of x
  Activation dy, x, dx;
  ChannelVector weight;
  ChannelVector mean, invstd;
  ChannelVector dweight, dbias;  // written; of any dtype
};

}  // namespace fastbn
