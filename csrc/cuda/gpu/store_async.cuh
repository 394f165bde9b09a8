// SPDX-License-Identifier: BSD-3-Clause
//
// Stores to the shared memory of the blocks of a cluster, from 9.0 on, which a barrier there counts
// the bytes of: a block waits for what others have to tell it, and not for them. A block may be
// stored to between a sync_cluster() after its barriers were initialized and its return.
//
// A barrier counts the bytes that come, and not whose they are. A block that is ahead may not store
// for the next phase while the barrier is in the one before, so there are two barriers in turn.
#pragma once

#include "copy_barrier.cuh"
#include "intrinsics.cuh"

#ifndef FASTBN_SIMULATOR

namespace fastbn::gpu {

namespace detail {

// An address of this block's shared memory in that of a block of the cluster.
FASTBN_DEVICE unsigned peer_address([[maybe_unused]] const void* own, [[maybe_unused]] int rank) {
  unsigned peer = 0;
#if __CUDA_ARCH__ >= 900
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(peer) : "r"(shared_address(own)), "r"(rank));
#endif
  return peer;
}

}  // namespace detail

// Stores 4, 8 or 16 bytes where a block of the cluster has what the calling block has at `own`. The
// bytes count for the barrier that it has where the calling block has `own_barrier`.
template <typename T>
FASTBN_DEVICE void store_async([[maybe_unused]] T* own, [[maybe_unused]] int rank,
                               [[maybe_unused]] const T& value,
                               [[maybe_unused]] CopyBarrier* own_barrier) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
#if __CUDA_ARCH__ >= 900
  const unsigned address = detail::peer_address(own, rank);
  const unsigned barrier = detail::peer_address(own_barrier, rank);
  const auto& word = reinterpret_cast<const detail::WordOf<T>&>(value);
  if constexpr (sizeof(T) == 4) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(address),
        "r"(word), "r"(barrier)
        : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(address),
        "l"(word), "r"(barrier)
        : "memory");
  } else {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
        "[%5];" ::"r"(address),
        "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w), "r"(barrier)
        : "memory");
  }
#endif
}

// Like wait_barrier(), for a barrier that blocks of the cluster store to: what they have stored is
// visible after.
FASTBN_DEVICE void wait_barrier_cluster([[maybe_unused]] CopyBarrier* barrier,
                                        [[maybe_unused]] int parity) {
#if __CUDA_ARCH__ >= 900
  unsigned ended = 0;
  while (ended == 0) {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended;\n"
        "}"
        : "=r"(ended)
        : "r"(detail::shared_address(barrier)), "r"(parity)
        : "memory");
  }
#endif
}

}  // namespace fastbn::gpu

#endif
