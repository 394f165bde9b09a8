// SPDX-License-Identifier: BSD-3-Clause
//
// The host's side of tensor_map.cuh. The driver encodes tensor maps; it is asked by a function that
// the runtime finds, so that nothing links with the driver.
#pragma once

#include "tensor_map.cuh"
#include "tensor_map_shape.h"

#ifndef FASTBN_SIMULATOR

#include <cuda.h>

#include <atomic>

namespace fastbn::gpu {

namespace detail {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// Null where the driver has none.
inline EncodeTiled find_encode_tiled() {
  constexpr const char* kName = "cuTensorMapEncodeTiled";
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  constexpr unsigned kSince = 12000;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(kName, &function, kSince, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(kName, &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) cudaGetLastError();  // reported by who finds none
  const bool is_there = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
  return is_there ? reinterpret_cast<EncodeTiled>(function) : nullptr;
}

// The same, looked up until it is found.
inline EncodeTiled encode_tiled() {
  static std::atomic<EncodeTiled> known{nullptr};
  EncodeTiled encode = known.load(std::memory_order_relaxed);
  if (encode == nullptr) {
    encode = find_encode_tiled();
    known.store(encode, std::memory_order_relaxed);
  }
  return encode;
}

inline CUtensorMapDataType tensor_map_type(int element_bytes) {
  switch (element_bytes) {
    case 2:
      return CU_TENSOR_MAP_DATA_TYPE_UINT16;
    case 4:
      return CU_TENSOR_MAP_DATA_TYPE_UINT32;
    default:
      return CU_TENSOR_MAP_DATA_TYPE_UINT64;
  }
}

}  // namespace detail

// Null, or what is wrong.
inline const char* encode_tensor_map(const TensorMapShape& shape, TensorMap* map) {
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) &&
                alignof(TensorMap) >= alignof(CUtensorMap));
  const detail::EncodeTiled encode = detail::encode_tiled();
  if (encode == nullptr)
    return "the driver has no tensor maps: one of CUDA 12.0 or later is needed";
  // The first dimension is the one whose elements are adjacent.
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(shape.columns),
                               static_cast<cuuint64_t>(shape.rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(shape.row_bytes)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(shape.box_columns),
                             static_cast<cuuint32_t>(shape.box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result =
      encode(reinterpret_cast<CUtensorMap*>(map), detail::tensor_map_type(shape.element_bytes), 2,
             const_cast<void*>(shape.data), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE,
             CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "the driver refuses to encode a tensor map";
}

}  // namespace fastbn::gpu

#endif
