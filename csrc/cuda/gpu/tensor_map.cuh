// SPDX-License-Identifier: BSD-3-Clause
//
// Copies of boxes of a matrix from global to shared memory, and stores of them, from 9.0 on: one
// instruction moves what may be many short pieces of rows. The matrix and the size of its boxes are
// encoded on the host, by encode_tensor_map.cuh.
#pragma once

#include "copy_barrier.cuh"
#include "intrinsics.cuh"

#ifndef FASTBN_SIMULATOR

namespace fastbn::gpu {

// What the copy engine wants to know of a matrix. It reads this from the kernel's parameters.
struct alignas(128) TensorMap {
  unsigned char encoded[128];
};

// Starts to copy the box whose first element is at `column` and `row` to a multiple of 128, row by
// row. Elements of it that are not in the matrix become zero. The barrier counts all bytes of the
// box.
FASTBN_DEVICE void bulk_copy_2d([[maybe_unused]] void* shared,
                                [[maybe_unused]] const TensorMap* map, [[maybe_unused]] int column,
                                [[maybe_unused]] int row, [[maybe_unused]] CopyBarrier* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
// The address may be said to be this block's since CUDA 12.8, as is all code for 10.0: 12.0 has a
// call in reserve for an address that is not.
#if __CUDA_ARCH__ >= 1000
      "cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%0], "
#else
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
#endif
      "[%1, {%2, %3}], [%4];" ::"r"(detail::shared_address(shared)),
      "l"(map), "r"(column), "r"(row), "r"(detail::shared_address(barrier))
      : "memory");
#endif
}

// Starts to store the box whose first element is at `column` and `row` from a multiple of 128, row
// by row. Elements of it that are not in the matrix are left out. It belongs to a group of bulk
// stores; see bulk_store.cuh.
FASTBN_DEVICE void bulk_store_2d([[maybe_unused]] const TensorMap* map, [[maybe_unused]] int column,
                                 [[maybe_unused]] int row, [[maybe_unused]] const void* shared) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map),
      "r"(column), "r"(row), "r"(detail::shared_address(shared))
      : "memory");
#endif
}

}  // namespace fastbn::gpu

#endif
