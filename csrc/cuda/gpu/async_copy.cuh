// SPDX-License-Identifier: BSD-3-Clause
//
// Asynchronous copies from global to shared memory: of single vectors, by the threads that ask for
// them, or of ranges in bulk, by the copy engine that came with 9.0. Before 8.0 there are neither,
// and a thread copies at once.
#pragma once

#include "copy_barrier.cuh"
#include "intrinsics.cuh"

#ifndef FASTBN_SIMULATOR

namespace fastbn::gpu {

// Starts to copy a vector.
FASTBN_DEVICE void copy_async(void* shared, const void* global) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(detail::shared_address(shared)),
               "l"(__cvta_generic_to_global(global))
               : "memory");
#else
  *static_cast<uint4*>(shared) = load<CacheHint::kStream>(static_cast<const uint4*>(global));
#endif
}

// An arrival that is made when all copies that this thread has started by copy_async() have landed.
FASTBN_DEVICE void arrive_when_copied(CopyBarrier* barrier) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(detail::shared_address(barrier))
      : "memory");
#else
  arrive(barrier);
#endif
}

// Starts to copy a range: addresses and bytes are multiples of 16.
FASTBN_DEVICE void bulk_copy([[maybe_unused]] void* shared, [[maybe_unused]] const void* global,
                             [[maybe_unused]] int bytes, [[maybe_unused]] CopyBarrier* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
// The address may be said to be this block's since CUDA 12.8, as is all code for 10.0: 12.0 has a
// call in reserve for an address that is not.
#if __CUDA_ARCH__ >= 1000
      "cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
#else
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
#endif
          "r"(detail::shared_address(shared)),
      "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(detail::shared_address(barrier))
      : "memory");
#endif
}

}  // namespace fastbn::gpu

#endif
