// SPDX-License-Identifier: BSD-3-Clause
//
// Stores of ranges from shared to global memory by the copy engine, from 9.0 on. The engine is
// another proxy than threads: what these have written it sees only where they have fenced since,
// and then met the thread that starts the store at a barrier.
//
// A thread commits what it has stored so far as a group. It waits until groups have been read from
// shared memory before that is written again, and before it returns. When they have arrived only
// the end of the kernel tells.
#pragma once

#include "copy_barrier.cuh"
#include "intrinsics.cuh"

#ifndef FASTBN_SIMULATOR

namespace fastbn::gpu {

// Makes what this thread has written to shared memory visible to the copy engine.
FASTBN_DEVICE void fence_async_proxy() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Starts to store a range: addresses and bytes are multiples of 16.
FASTBN_DEVICE void bulk_store([[maybe_unused]] void* global, [[maybe_unused]] const void* shared,
                              [[maybe_unused]] int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(
                   __cvta_generic_to_global(global)),
               "r"(detail::shared_address(shared)), "r"(bytes)
               : "memory");
#endif
}

// Makes a group of what this thread has stored since the last one.
FASTBN_DEVICE void commit_bulk_stores() {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

// Waits until all groups of this thread but the last kPending have been read from shared memory.
template <int kPending>
FASTBN_DEVICE void wait_bulk_stores_read() {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace fastbn::gpu

#endif
