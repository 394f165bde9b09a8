// SPDX-License-Identifier: BSD-3-Clause
//
// Asynchronous copies from global to shared memory, and the barriers that wait for them. Copies are
// of single vectors, by the threads that ask for them, or of ranges in bulk, by the copy engine
// that came with 9.0. Before 8.0 there are neither: a thread copies at once, and the barrier is the
// block's.
#pragma once

#include "intrinsics.cuh"

#ifndef FASTBN_SIMULATOR

namespace fastbn::gpu {

// Lies in shared memory, and goes through phases: one ends when all arrivals have been made and all
// bytes that they expect have landed.
struct CopyBarrier {
  uint64_t state;
};

namespace detail {

FASTBN_DEVICE unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

}  // namespace detail

// Initializes a barrier: one thread calls it, before a sync_block().
FASTBN_DEVICE void init_barrier([[maybe_unused]] CopyBarrier* barrier,
                                [[maybe_unused]] int arrivals) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(detail::shared_address(barrier)),
               "r"(arrivals)
               : "memory");
#endif
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");  // to the copy engine, too
#endif
}

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
FASTBN_DEVICE void arrive_when_copied([[maybe_unused]] CopyBarrier* barrier) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(detail::shared_address(barrier))
      : "memory");
#endif
}

// An arrival that lets the phase wait for so many bytes more.
FASTBN_DEVICE void expect_bytes([[maybe_unused]] CopyBarrier* barrier, [[maybe_unused]] int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(detail::shared_address(barrier)),
      "r"(bytes)
      : "memory");
#endif
}

// Starts to copy a range: addresses and bytes are multiples of 16.
FASTBN_DEVICE void bulk_copy([[maybe_unused]] void* shared, [[maybe_unused]] const void* global,
                             [[maybe_unused]] int bytes, [[maybe_unused]] CopyBarrier* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(detail::shared_address(shared)),
      "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(detail::shared_address(barrier))
      : "memory");
#endif
}

// Waits for the end of the phase of that parity, counted from 0: for the first phase, 0. For all
// threads of the block to call.
FASTBN_DEVICE void wait_barrier([[maybe_unused]] CopyBarrier* barrier,
                                [[maybe_unused]] int parity) {
#if __CUDA_ARCH__ >= 800
  unsigned ended = 0;
  while (ended == 0) {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
#if __CUDA_ARCH__ >= 900
        "mbarrier.try_wait.parity.shared.b64 ended, [%1], %2;\n"
#else
        "mbarrier.test_wait.parity.shared.b64 ended, [%1], %2;\n"
#endif
        "selp.u32 %0, 1, 0, ended;\n"
        "}"
        : "=r"(ended)
        : "r"(detail::shared_address(barrier)), "r"(parity)
        : "memory");
  }
#else
  __syncthreads();
#endif
}

}  // namespace fastbn::gpu

#endif
