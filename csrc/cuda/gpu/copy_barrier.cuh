// SPDX-License-Identifier: BSD-3-Clause
//
// Barriers in shared memory that some threads arrive at and others wait for: the hardware's
// mbarriers from 8.0 on, and counters before. The waiting thread sees what the arriving ones have
// written, and what they have read may be written over.
#pragma once

#include "intrinsics.cuh"

#ifndef FASTBN_SIMULATOR

namespace fastbn::gpu {

// Goes through phases: one ends when all arrivals have been made and all bytes that they expect
// have landed.
struct CopyBarrier {
  uint64_t state;
};

namespace detail {

// What a barrier is before 8.0.
struct CountedArrivals {
  unsigned made;  // in all phases
  unsigned per_phase;
};
static_assert(sizeof(CountedArrivals) == sizeof(CopyBarrier));

FASTBN_DEVICE CountedArrivals* counted_arrivals(CopyBarrier* barrier) {
  return reinterpret_cast<CountedArrivals*>(barrier);
}

FASTBN_DEVICE unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

}  // namespace detail

// Initializes a barrier: one thread calls it, before a sync_block().
FASTBN_DEVICE void init_barrier(CopyBarrier* barrier, int arrivals) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(detail::shared_address(barrier)),
               "r"(arrivals)
               : "memory");
#else
  *detail::counted_arrivals(barrier) = {0, static_cast<unsigned>(arrivals)};
#endif
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");  // to the copy engine, too
#endif
}

// An arrival of the calling thread, which has done all that it wanted to do before.
FASTBN_DEVICE void arrive(CopyBarrier* barrier) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "{\n"
      ".reg .b64 state;\n"
      "mbarrier.arrive.shared.b64 state, [%0];\n"
      "}" ::"r"(detail::shared_address(barrier))
      : "memory");
#else
  __threadfence_block();
  atomicAdd(&detail::counted_arrivals(barrier)->made, 1u);
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

// Waits for the end of the phase of that parity, counted from 0: for the first phase, 0. A thread
// may wait alone. Parity 1 lets it pass a barrier that is in its first phase, like one whose phase
// before the first has ended.
FASTBN_DEVICE void wait_barrier(CopyBarrier* barrier, int parity) {
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
  const volatile detail::CountedArrivals* arrivals = detail::counted_arrivals(barrier);
  while (arrivals->made / arrivals->per_phase % 2 == static_cast<unsigned>(parity)) {
  }
  __threadfence_block();
#endif
}

}  // namespace fastbn::gpu

#endif
