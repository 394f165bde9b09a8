// SPDX-License-Identifier: BSD-3-Clause
//
// The machine: everything about a GPU that kernels use and C++ has no word for, here and in
// the files next to this one. Kernels are written on these alone, so that a simulator which offers
// the same functions can run them on a CPU, and says so by FASTBN_SIMULATOR.
#pragma once

#if defined(FASTBN_SIMULATOR)

#include <cudasim/gpu.h>

#elif !defined(__CUDACC__)

#error "kernels are compiled by nvcc, or for the simulator with FASTBN_SIMULATOR defined"

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../../core/dtype.h"
#include "../geometry.h"

#define FASTBN_DEVICE __device__ __forceinline__
// A function that is called, and so compiled once for all who call it.
#define FASTBN_DEVICE_CALL inline __device__ __noinline__
// A kernel for blocks of at most `threads` threads, of which `blocks` share an SM's registers.
#define FASTBN_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define FASTBN_PARAMETER const __grid_constant__

namespace fastbn::gpu {

// --- Where a thread is -------------------------------------------------------------------------

FASTBN_DEVICE int thread_index() { return threadIdx.x; }
FASTBN_DEVICE int block_threads() { return blockDim.x; }
FASTBN_DEVICE int block_index() { return blockIdx.x; }
FASTBN_DEVICE int grid_blocks() { return gridDim.x; }

// --- Shared memory and barriers ------------------------------------------------------------------

// The block's dynamic shared memory, aligned to 128 bytes, as boxes of a matrix must be.
FASTBN_DEVICE void* shared_memory() {
  extern __shared__ __align__(128) unsigned char shared[];
  return shared;
}

// Waits for all threads of the block; what they wrote before is visible after.
FASTBN_DEVICE void sync_block() { __syncthreads(); }

// Access what asynchronous copies write and bulk stores read. The simulator checks that they come
// in order, which it cannot for plain accesses.
template <typename T>
FASTBN_DEVICE T load_shared(const T* address) {
  return *address;
}
template <typename T>
FASTBN_DEVICE void store_shared(T* address, const T& value) {
  *address = value;
}

// Makes what this thread wrote visible to other blocks before anything it does later.
FASTBN_DEVICE void fence_device() { __threadfence(); }

// --- Within a warp -------------------------------------------------------------------------------

using cuda::kWarpThreads;

FASTBN_DEVICE void sync_warp() { __syncwarp(); }

// The value of the thread `delta` lanes further, or the own one where the warp ends before it. All
// threads of the warp must call.
template <typename T>
FASTBN_DEVICE T shuffle_down(const T& value, int delta) {
  static_assert(sizeof(T) % sizeof(unsigned) == 0);
  constexpr int kWords = sizeof(T) / sizeof(unsigned);
  T result;
  const unsigned* from = reinterpret_cast<const unsigned*>(&value);
  unsigned* to = reinterpret_cast<unsigned*>(&result);
#pragma unroll
  for (int i = 0; i < kWords; ++i) to[i] = __shfl_down_sync(0xffffffff, from[i], delta);
  return result;
}

// Bits that are set.
FASTBN_DEVICE int count_bits(unsigned word) { return __popc(word); }

// --- Clusters of blocks --------------------------------------------------------------------------

// Waits for all threads of the cluster; what they wrote before is visible after. Until the first
// one a block may not have started, and after the last one it may have returned: its shared memory
// is there for the others only in between.
FASTBN_DEVICE void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
#endif
}

// --- Across the grid -----------------------------------------------------------------------------

// Adds one to a counter, which wraps to zero after `last`. Returns the value before. Like CUDA's
// atomicInc().
FASTBN_DEVICE unsigned atomic_inc_wrap(unsigned* counter, unsigned last) {
  return atomicInc(counter, last);
}

// Adds to a counter after everything this thread wrote, and what it knew to be written, is visible
// to those who read the sum by load_acquire() or by adding to it; what they had written is visible
// to this thread after. Returns the value before.
FASTBN_DEVICE unsigned add_acq_rel(unsigned* counter, unsigned value) {
  unsigned before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(counter)), "r"(value)
               : "memory");
  return before;
}

// Reads a counter that other blocks change, as often as it takes. What they wrote before is not
// visible by that.
FASTBN_DEVICE unsigned load_relaxed(const unsigned* address) {
  unsigned value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];"
               : "=r"(value)
               : "l"(__cvta_generic_to_global(address))
               : "memory");
  return value;
}

// Reads a counter that other blocks change by add_acq_rel() or atomic_inc_wrap(), and makes visible
// what they wrote before: it empties the multiprocessor's cache.
FASTBN_DEVICE unsigned load_acquire(const unsigned* address) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
               : "=r"(value)
               : "l"(__cvta_generic_to_global(address))
               : "memory");
  return value;
}

// --- Global memory -------------------------------------------------------------------------------

// Whether the cache lines of an access are kept for whoever comes back to them, or are the first to
// make room. kOwn is kStream of what this block has written, before a barrier.
enum class CacheHint { kKeep, kStream, kOwn };

// Elements that are loaded and stored at once; 16 bytes of them must lie at a multiple of 16.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  T elements[kWidth];
};

namespace detail {

// The unsigned integer, or vector of them, that the machine moves so many bytes by.
template <int kBytes>
struct Word;
template <>
struct Word<1> {
  using Type = unsigned char;
};
template <>
struct Word<2> {
  using Type = unsigned short;
};
template <>
struct Word<4> {
  using Type = unsigned;
};
template <>
struct Word<8> {
  using Type = unsigned long long;
};
template <>
struct Word<16> {
  using Type = uint4;
};

template <typename T>
using WordOf = typename Word<sizeof(T)>::Type;

}  // namespace detail

// Reads what no kernel in flight writes, unless it is the block's own: inputs, which outputs never
// overlap.
template <CacheHint kHint, typename T>
FASTBN_DEVICE T load(const T* address) {
  using Word = detail::WordOf<T>;
  const Word* word_address = reinterpret_cast<const Word*>(address);
  const Word word = kHint == CacheHint::kKeep ? __ldg(word_address) : __ldcs(word_address);
  return reinterpret_cast<const T&>(word);
}

// Reads what other blocks of this kernel may have written.
template <typename T>
FASTBN_DEVICE T load_coherent(const T* address) {
  asm volatile("" ::: "memory");  // not before what precedes it
  const auto word = __ldcg(reinterpret_cast<const detail::WordOf<T>*>(address));
  return reinterpret_cast<const T&>(word);
}

// Brings what is going to be read into the last-level cache.
FASTBN_DEVICE void prefetch(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(address)));
}

template <CacheHint kHint, typename T>
FASTBN_DEVICE void store(T* address, const T& value) {
  using Word = detail::WordOf<T>;
  Word* word_address = reinterpret_cast<Word*>(address);
  const Word& word = reinterpret_cast<const Word&>(value);
  if (kHint == CacheHint::kStream) {
    __stcs(word_address, word);
  } else {
    *word_address = word;
  }
}

// --- 16-bit floating point -----------------------------------------------------------------------

FASTBN_DEVICE double widen(double value) { return value; }
FASTBN_DEVICE float widen(float value) { return value; }
FASTBN_DEVICE float widen(BFloat16 value) {
  return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
}
FASTBN_DEVICE float widen(Float16 value) { return __half2float(__ushort_as_half(value.bits)); }

template <int kCount, typename scalar_t, typename acc_t>
FASTBN_DEVICE void widen(const scalar_t (&from)[kCount], acc_t (&to)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i] = widen(from[i]);
}
// Two of a word take an instruction each. The elements of a Vector, which is aligned.
template <int kCount>
FASTBN_DEVICE void widen(const BFloat16 (&from)[kCount], float (&to)[kCount]) {
#pragma unroll
  for (int i = 0; i + 1 < kCount; i += 2) {
    const unsigned pair = reinterpret_cast<const unsigned&>(from[i]);
    to[i] = __uint_as_float(pair << 16);
    to[i + 1] = __uint_as_float(pair & 0xffff0000);
  }
  if (kCount % 2 == 1) to[kCount - 1] = widen(from[kCount - 1]);
}

// Rounds to nearest even.
template <int kCount>
FASTBN_DEVICE void narrow(const double (&from)[kCount], double (&to)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i] = from[i];
}
template <int kCount>
FASTBN_DEVICE void narrow(const float (&from)[kCount], float (&to)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i] = from[i];
}
// Converts two values at a time, as the machine does.
template <int kCount>
FASTBN_DEVICE void narrow(const float (&from)[kCount], BFloat16 (&to)[kCount]) {
#pragma unroll
  for (int i = 0; i + 1 < kCount; i += 2) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(from[i], from[i + 1]);
    to[i].bits = __bfloat16_as_ushort(pair.x);
    to[i + 1].bits = __bfloat16_as_ushort(pair.y);
  }
  if (kCount % 2 == 1) {
    to[kCount - 1].bits = __bfloat16_as_ushort(__float2bfloat16_rn(from[kCount - 1]));
  }
}
template <int kCount>
FASTBN_DEVICE void narrow(const float (&from)[kCount], Float16 (&to)[kCount]) {
#pragma unroll
  for (int i = 0; i + 1 < kCount; i += 2) {
    const __half2 pair = __floats2half2_rn(from[i], from[i + 1]);
    to[i].bits = __half_as_ushort(pair.x);
    to[i + 1].bits = __half_as_ushort(pair.y);
  }
  if (kCount % 2 == 1) {
    to[kCount - 1].bits = __half_as_ushort(__float2half_rn(from[kCount - 1]));
  }
}

// --- Elementary functions ------------------------------------------------------------------------

// Those of many instructions are called.

// In few instructions; off by 2 units in the last place at most, and 0 where the divisor is above
// 2^126.
FASTBN_DEVICE float divide(float dividend, float divisor) { return __fdividef(dividend, divisor); }
FASTBN_DEVICE_CALL double divide(double dividend, double divisor) { return dividend / divisor; }
FASTBN_DEVICE float exp(float value) { return ::expf(value); }
FASTBN_DEVICE_CALL double exp(double value) { return ::exp(value); }
FASTBN_DEVICE_CALL float expm1(float value) { return ::expm1f(value); }
FASTBN_DEVICE_CALL double expm1(double value) { return ::expm1(value); }
// The cumulative distribution function of the normal distribution.
FASTBN_DEVICE_CALL float normal_cdf(float value) { return ::normcdff(value); }
FASTBN_DEVICE_CALL double normal_cdf(double value) { return ::normcdf(value); }

// --- Two kernels in a row ------------------------------------------------------------------------

// Programmatic dependent launch: the first kernel lets the second one's blocks take places that its
// own leave, and the second waits for all that the first wrote.
FASTBN_DEVICE void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
FASTBN_DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace fastbn::gpu

#endif
