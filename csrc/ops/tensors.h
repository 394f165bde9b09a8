// SPDX-License-Identifier: BSD-3-Clause
//
// What tensors are to a problem: its dtype, layout and sizes, activations and vectors.
#pragma once

#include <ATen/ops/clone.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "../core/mask.h"
#include "ops.h"

namespace fastbn {

inline DType dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return DType::kFloat64;
    case at::kFloat:
      return DType::kFloat32;
    case at::kBFloat16:
      return DType::kBFloat16;
    default:
      return DType::kFloat16;
  }
}

inline at::ScalarType accumulate_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline at::Tensor empty_vector(const at::Tensor& x, int64_t elements, at::ScalarType type) {
  return at::empty({elements}, x.options().dtype(type));
}

// The memory format of x and of all results, as stock has it. Strides of dimensions of size one
// mean nothing and are not looked at, where there is a choice.
inline at::MemoryFormat format_of(const at::Tensor& x) {
  if (x.is_contiguous()) return at::MemoryFormat::Contiguous;
  for (const auto format : {at::MemoryFormat::ChannelsLast, at::MemoryFormat::ChannelsLast3d}) {
    if (x.is_contiguous(format)) return format;
  }
  return x.suggest_memory_format();
}

inline Layout layout_of(const at::Tensor& x, int64_t spatial) {
  const at::MemoryFormat format = format_of(x);
  if (!x.is_contiguous(format)) return Layout::kGeneric;
  return format != at::MemoryFormat::Contiguous || spatial == 1 ? Layout::kChannelsLast
                                                                : Layout::kContiguous;
}

inline int64_t channels_of(const at::Tensor& x) { return x.dim() < 2 ? 0 : x.size(1); }

inline Problem problem_of(const at::Tensor& x) {
  if (x.numel() == 0) return {dtype_of(x), Layout::kGeneric, 0, channels_of(x), 0};
  const int64_t spatial = x.numel() / (x.size(0) * x.size(1));
  return {dtype_of(x), layout_of(x, spatial), x.size(0), x.size(1), spatial};
}

inline at::Tensor empty_result(const at::Tensor& x) { return at::empty_like(x, format_of(x)); }

// Merges spatial dimensions that follow one another in memory. False if too many are left.
template <typename Data>
bool set_strides(const at::Tensor& tensor, Activation<Data>& activation) {
  activation.batch_stride = tensor.stride(0);
  activation.channel_stride = tensor.stride(1);
  int& dims = activation.spatial_dims;
  dims = 0;
  for (int64_t d = 2; d < tensor.dim(); ++d) {
    const int64_t size = tensor.size(d);
    const int64_t stride = tensor.stride(d);
    if (size == 1) continue;
    if (dims > 0 && activation.strides[dims - 1] == size * stride) {
      activation.sizes[dims - 1] *= size;
      activation.strides[dims - 1] = stride;
      continue;
    }
    if (dims == kMaxSpatialDims) return false;
    activation.sizes[dims] = size;
    activation.strides[dims] = stride;
    ++dims;
  }
  return true;
}

template <typename Data>
Activation<Data> activation_of(const at::Tensor& tensor, Data* data) {
  Activation<Data> activation;
  activation.data = data;
  TORCH_CHECK(set_strides(tensor, activation), "batch_norm supports strided inputs of up to ",
              kMaxSpatialDims, " spatial dimensions that cannot be merged, but got shape ",
              tensor.sizes(), " with strides ", tensor.strides(), "; pass x.contiguous()");
  return activation;
}

// Memory that is only read is asked for as const: that does not copy a tensor that is copied on
// write.
inline InputActivation input(const at::Tensor& tensor) {
  return activation_of(tensor, tensor.const_data_ptr());
}
inline OutputActivation output(const at::Tensor& tensor) {
  return activation_of(tensor, tensor.mutable_data_ptr());
}

// A view of the vector's elements in one dimension; a copy where there is none.
inline InputVector input_vector(const OptionalTensor& vector, at::Tensor& keep_alive) {
  if (!vector) return {};
  keep_alive = vector->dim() == 1 ? *vector : vector->reshape({-1});
  return {keep_alive.const_data_ptr(), dtype_of(keep_alive), keep_alive.stride(0)};
}
// The same for a vector that will be written, which must have such a view.
inline OutputVector updated_vector(const OptionalTensor& vector) {
  if (!vector) return {};
  const at::Tensor view = vector->dim() == 1 ? *vector : vector->view({-1});
  return {view.mutable_data_ptr(), dtype_of(view), view.stride(0)};
}
inline OutputVector output_vector(const at::Tensor& vector) {
  if (vector.numel() == 0) return {};
  return {vector.mutable_data_ptr(), dtype_of(vector), 1};
}

// An activation in the layout of x; a copy where it has another.
inline at::Tensor like(const at::Tensor& x, const Problem& problem, const at::Tensor& other) {
  return problem.layout == Layout::kGeneric ? other : other.contiguous(format_of(x));
}

// The same that is taken in vectors, as a mask is: a copy where it does not begin with one.
inline at::Tensor in_vectors(const at::Tensor& activation, bool has_mask) {
  const auto address = reinterpret_cast<uintptr_t>(activation.const_data_ptr());
  return has_mask && address % kMaskedBytes != 0 ? at::clone(activation, at::MemoryFormat::Preserve)
                                                 : activation;
}

}  // namespace fastbn
