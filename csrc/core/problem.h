// SPDX-License-Identifier: BSD-3-Clause
//
// The operations that every backend computes, as plain structs: no torch, no CUDA.
//
// N is the batch, C the channels and S the spatial positions of one sample (L, H*W or D*H*W; 1 for
// a matrix). Statistics are taken over the elements of a channel.
//
// Batch norm in training has five steps: reduce the statistics, combine and finalize them, apply
// them; and for the gradients reduce, then apply. An operation takes all of its steps or, where
// statistics are combined with those of other processes, only those before or after that.
#pragma once

#include <cstdint>
#include <type_traits>

#include "activation_table.h"
#include "dtype.h"
#include "host_device.h"

namespace fastbn {

// How the elements of all activations of a problem lie in memory.
enum class Layout : int8_t {
  kContiguous,    // NCS: the positions of one channel of one sample are adjacent
  kChannelsLast,  // NSC, and any (N, C) matrix: the channels of one position are adjacent
  kGeneric,       // any strides
};

// Spatial dimensions of an activation after adjacent ones have been merged.
constexpr int kMaxSpatialDims = 8;

// An activation tensor. Strides count elements.
template <typename Data>
struct Activation {
  Data* data = nullptr;
  int64_t batch_stride = 0;
  int64_t channel_stride = 0;
  int spatial_dims = 0;
  int64_t sizes[kMaxSpatialDims] = {};
  int64_t strides[kMaxSpatialDims] = {};

  // What is written can be read by whoever comes next.
  template <typename Mutable = Data, typename = std::enable_if_t<!std::is_const_v<Mutable>>>
  FASTBN_HOST_DEVICE operator Activation<const Mutable>() const {
    Activation<const Mutable> input{data, batch_stride, channel_stride, spatial_dims, {}, {}};
    for (int d = 0; d < spatial_dims; ++d) {
      input.sizes[d] = sizes[d];
      input.strides[d] = strides[d];
    }
    return input;
  }
};

// Activations that an operation reads and that it writes. They are disjoint(), see below: backends
// read inputs through caches that do not see writes, and write the elements where two vectors
// overlap twice, each time from the input.
using InputActivation = Activation<const void>;
using OutputActivation = Activation<void>;

// One value per channel; `data` is null where the caller gave none.
template <typename Data>
struct ChannelVector {
  Data* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t stride = 1;

  // A vector that is written can be read.
  template <typename Mutable = Data, typename = std::enable_if_t<!std::is_const_v<Mutable>>>
  FASTBN_HOST_DEVICE operator ChannelVector<const Mutable>() const {
    return {data, dtype, stride};
  }
};

using InputVector = ChannelVector<const void>;
using OutputVector = ChannelVector<void>;

// Without elements the layout is kGeneric, and no operation but one that takes Steps::kApply is
// asked for.
struct Problem {
  DType dtype = DType::kFloat32;  // of the activations
  Layout layout = Layout::kContiguous;
  int64_t batch = 0;
  int64_t channels = 0;
  int64_t spatial = 0;

  int64_t per_channel() const { return batch * spatial; }
};

// Bytes from an activation's first element to behind its last.
template <typename Data>
int64_t extent_bytes(const Problem& problem, const Activation<Data>& activation) {
  if (problem.per_channel() * problem.channels == 0) return 0;
  int64_t last = (problem.batch - 1) * activation.batch_stride +
                 (problem.channels - 1) * activation.channel_stride;
  for (int d = 0; d < activation.spatial_dims; ++d) {
    last += (activation.sizes[d] - 1) * activation.strides[d];
  }
  return (last + 1) * element_size(problem.dtype);
}

// Whether an output and an input of a problem share no memory, as every backend demands.
inline bool disjoint(const Problem& problem, const OutputActivation& output,
                     const InputActivation& input) {
  if (output.data == nullptr || input.data == nullptr) return true;
  const auto* first = static_cast<const char*>(output.data);
  const auto* second = static_cast<const char*>(input.data);
  return first + extent_bytes(problem, output) <= second ||
         second + extent_bytes(problem, input) <= first;
}

// Which steps an operation takes.
enum class Steps : int8_t {
  kAll,
  kReduce,  // leaves a row of partial results
  kApply,   // combines rows of them and goes on
};

// Partial results of a reduction as processes exchange them, in rows of float64. A row of forward
// is a count, then two numbers of each channel, the first of all channels before the second: mean
// and m2 (the sum of squared deviations from it) or, if rows are to be added up, count * mean and
// m2 + count * mean^2. Rows that are added lose of the variance's digits what mean^2 / var takes of
// float64's: where inputs are float64 themselves they had better be gathered. A row of backward is
// the sums of dy and of dy * (x - mean), without a count.
struct PartialRows {
  double* out = nullptr;       // kReduce: one row, written
  const double* in = nullptr;  // kApply: all rows, read
  int64_t rows = 0;
  bool additive = false;  // of forward
};

// Statistics over all batches.
struct RunningStatistics {
  OutputVector mean, var;                  // updated; both or neither
  int64_t* num_batches_tracked = nullptr;  // incremented when given
  bool counted = false;                    // the batch was counted before
  bool cumulative = false;                 // momentum = 1 / num_batches_tracked
  double momentum = 0;
};

// What follows batch norm: y = function(z), where z, the pre-activation, is what batch norm alone
// computes, plus the residual where there is one.
struct Epilogue {
  ActivationFunction function = ActivationFunction::kIdentity;
  double parameter = 0;  // of a function that has one
  InputActivation residual;
  uint8_t* mask_out = nullptr;    // forward: written unless it is null; see mask.h
  const uint8_t* mask = nullptr;  // backward: read in the place of the residual

  FASTBN_HOST_DEVICE bool is_empty() const {
    return function == ActivationFunction::kIdentity && residual.data == nullptr;
  }
};

// y = (x - mean) * invstd * weight + bias, and the epilogue, with the statistics of x, which are
// also written to `mean` and `invstd` and blended into the running statistics.
struct TrainingForward {
  Problem problem;
  Steps steps = Steps::kAll;
  double count = 0;  // values of a channel; kApply: unknown before rows are combined
  InputActivation x;
  OutputActivation y;  // not written by kReduce
  InputVector weight, bias;
  RunningStatistics running;
  double eps = 0;
  // Written; accumulate_dtype or, so that backward finds the same pre-activation again, float64.
  OutputVector mean, invstd;
  Epilogue epilogue;  // of all steps at once
  PartialRows partials;
  double* total_count = nullptr;  // kApply: written, what the counts of all rows add up to
};

// Statistics as a forward with an epilogue has saved them; float64.
struct SavedStatistics {
  InputVector mean, invstd;
  bool training = true;  // that forward was a TrainingForward
};

// The same y with given statistics; `mean` and `invstd` are written when they are not null.
struct EvalForward {
  Problem problem;
  InputActivation x;
  OutputActivation y;
  InputVector weight, bias;
  InputVector running_mean, running_var;
  double eps = 0;
  SavedStatistics saved;  // in the place of the three above, unless null: y as it was, to the bit
  OutputVector mean, invstd;
  Epilogue epilogue;
};

// Gradients of either forward; those whose pointer is null are not wanted.
struct Backward {
  Problem problem;
  bool training = true;  // the statistics are functions of x
  Steps steps = Steps::kAll;
  double count = 0;                     // values of a channel; kApply: see total_count
  const double* total_count = nullptr;  // kApply: as forward has written it
  InputActivation dy, x;
  OutputActivation dx;
  OutputActivation dresidual;  // the gradient of the pre-activation
  InputVector weight;
  InputVector bias;  // read where there is an epilogue
  InputVector mean, invstd;
  OutputVector dweight, dbias;  // written; of any dtype
  Epilogue epilogue;            // of all steps at once
  PartialRows partials;
};

}  // namespace fastbn
