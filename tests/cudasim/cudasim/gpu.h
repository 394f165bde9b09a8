// SPDX-License-Identifier: BSD-3-Clause
//
// The machine for a host compiler: the functions of the files in csrc/cuda/gpu, simulated. They do
// what the CUDA ones do, count it, and throw where the GPU would do something undefined. Compile
// with -Wno-unknown-pragmas if with -Wall: `#pragma unroll` is not for this compiler.
//
// It cannot tell time.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../../../csrc/core/dtype.h"
#include "../../../csrc/cuda/gpu/tensor_map_shape.h"
#include "cudasim.h"
#include "half.h"
#include "machine.h"
#include "memory.h"

#define FASTBN_DEVICE inline
#define FASTBN_DEVICE_CALL inline
#define FASTBN_KERNEL(threads, blocks) void
#define FASTBN_PARAMETER const

namespace fastbn::gpu {

// --- Where a thread is -------------------------------------------------------------------------

FASTBN_DEVICE int thread_index() { return cudasim::current->index; }
FASTBN_DEVICE int block_threads() { return cudasim::shape.threads; }
FASTBN_DEVICE int block_index() { return static_cast<int>(cudasim::current->block->index); }
FASTBN_DEVICE int grid_blocks() { return static_cast<int>(cudasim::shape.blocks); }

// --- Shared memory and barriers ------------------------------------------------------------------

FASTBN_DEVICE void* shared_memory() { return cudasim::current->block->shared; }

FASTBN_DEVICE void sync_block(cudasim::Site site = cudasim::Site::here()) {
  cudasim::sync_block(site);
}

FASTBN_DEVICE void fence_device() { cudasim::fence_device(); }

// Reads and writes what copies write or bulk stores read, so that their order can be checked.
template <typename T>
FASTBN_DEVICE T load_shared(const T* address) {
  cudasim::load_shared(address, sizeof(T));
  return *address;
}
template <typename T>
FASTBN_DEVICE void store_shared(T* address, const T& value) {
  cudasim::store_shared(address, sizeof(T));
  *address = value;
}

FASTBN_DEVICE unsigned atomic_inc_wrap(unsigned* counter, unsigned last) {
  return cudasim::atomic_inc_wrap(counter, last);
}

// --- Within a warp -------------------------------------------------------------------------------

using cuda::kWarpThreads;

FASTBN_DEVICE void sync_warp(cudasim::Site site = cudasim::Site::here()) {
  cudasim::sync_warp(site);
}

// The value of the thread `delta` lanes further, or the own one where the warp ends before it.
template <typename T>
FASTBN_DEVICE T shuffle_down(const T& value, int delta,
                             cudasim::Site site = cudasim::Site::here()) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) % 4 == 0);
  static_assert(sizeof(T) <= cudasim::Warp::kSlotBytes);
  const int lane = thread_index() % kWarpThreads;
  const int source = lane + delta < kWarpThreads ? lane + delta : lane;
  T result;
  cudasim::exchange(&value, sizeof(T), source, &result, "shuffle_down()", site);
  return result;
}

FASTBN_DEVICE int count_bits(unsigned word) { return __builtin_popcount(word); }

// --- Clusters of blocks --------------------------------------------------------------------------

// Waits for all threads of the cluster; what they wrote before is visible after. Until the first
// one a block may not have started, and after the last one it may have returned: its shared memory
// is there for the others only in between.
FASTBN_DEVICE void sync_cluster(cudasim::Site site = cudasim::Site::here()) {
  cudasim::sync_cluster(site);
}

// --- Across the grid -----------------------------------------------------------------------------

// Adds to a counter after everything this thread wrote, and what it knew to be written, is visible
// to those who read the sum by load_acquire() or by adding to it; what they had written is visible
// to this thread after. Returns the value before.
FASTBN_DEVICE unsigned add_acq_rel(unsigned* counter, unsigned value) {
  return cudasim::add_acq_rel(counter, value);
}

// Reads a counter that other blocks change, as often as it takes. What they wrote before is not
// visible by that.
FASTBN_DEVICE unsigned load_relaxed(const unsigned* address,
                                    cudasim::Site site = cudasim::Site::here()) {
  return cudasim::load_relaxed(address, site);
}

// Reads a counter that other blocks change by add_acq_rel() or atomic_inc_wrap(), and makes visible
// what they wrote before.
FASTBN_DEVICE unsigned load_acquire(const unsigned* address,
                                    cudasim::Site site = cudasim::Site::here()) {
  return cudasim::load_acquire(address, site);
}

// --- Global memory -------------------------------------------------------------------------------

enum class CacheHint { kKeep, kStream, kOwn };

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  T elements[kWidth];
};

namespace detail {

constexpr cudasim::Access kLoad = {"load", /*stores=*/false, /*sees_stores=*/false};
constexpr cudasim::Access kLoadCoherent = {"load_coherent", /*stores=*/false, /*sees_stores=*/true};
constexpr cudasim::Access kStore = {"store", /*stores=*/true, /*sees_stores=*/true};

// The entry of a histogram that counts accesses of a type: the machine has words of these sizes.
template <typename T>
constexpr size_t histogram_entry() {
  static_assert(std::is_trivially_copyable_v<T>);
  size_t entry = 0;
  while (sizeof(T) >> entry > 1) ++entry;
  static_assert((sizeof(T) & (sizeof(T) - 1)) == 0 && sizeof(T) <= 16);
  return entry;
}

template <typename T>
T counted_load(const T* address, const cudasim::Access& access) {
  ++cudasim::memory.touch(address, sizeof(T), sizeof(T), access).loads[histogram_entry<T>()];
  T value;
  std::memcpy(static_cast<void*>(&value), static_cast<const void*>(address), sizeof(T));
  return value;
}

}  // namespace detail

template <CacheHint kHint, typename T>
FASTBN_DEVICE T load(const T* address) {
  const bool sees_stores = kHint == CacheHint::kOwn;
  return detail::counted_load(address, sees_stores ? detail::kLoadCoherent : detail::kLoad);
}

template <typename T>
FASTBN_DEVICE T load_coherent(const T* address) {
  return detail::counted_load(address, detail::kLoadCoherent);
}

FASTBN_DEVICE void prefetch(const void*) {}

template <CacheHint kHint, typename T>
FASTBN_DEVICE void store(T* address, const T& value) {
  ++cudasim::memory.touch(address, sizeof(T), sizeof(T), detail::kStore)
        .stores[detail::histogram_entry<T>()];
  std::memcpy(static_cast<void*>(address), static_cast<const void*>(&value), sizeof(T));
}

// --- Asynchronous copies from global to shared memory --------------------------------------------

// Starts to copy a vector.
FASTBN_DEVICE void copy_async(void* shared, const void* global) {
  cudasim::copy_async(shared, global);
}

// Lies in shared memory. It goes through phases: one ends when all arrivals have been made and all
// bytes that they expect have landed.
struct CopyBarrier {
  uint64_t state;
};

// For one thread to call, before a sync_block().
FASTBN_DEVICE void init_barrier(CopyBarrier* barrier, int arrivals) {
  cudasim::init_barrier(barrier, arrivals);
}

// An arrival that is made when all copies that this thread has started by copy_async() have landed.
FASTBN_DEVICE void arrive_when_copied(CopyBarrier* barrier) {
  cudasim::arrive_when_copied(barrier);
}

// An arrival of the calling thread, which has done all that it wanted to do before.
FASTBN_DEVICE void arrive(CopyBarrier* barrier, cudasim::Site site = cudasim::Site::here()) {
  cudasim::arrive(barrier, site);
}

// An arrival that lets the phase wait for so many bytes more.
FASTBN_DEVICE void expect_bytes(CopyBarrier* barrier, int bytes) {
  cudasim::expect_bytes(barrier, bytes);
}

// Starts to copy a range: addresses and bytes are multiples of 16.
FASTBN_DEVICE void bulk_copy(void* shared, const void* global, int bytes, CopyBarrier* barrier) {
  cudasim::bulk_copy(shared, global, bytes, barrier);
}

// Waits for the end of the phase of that parity, counted from 0: for the first phase, 0. A thread
// may wait alone. Parity 1 lets it pass a barrier that is in its first phase, like one whose phase
// before the first has ended.
FASTBN_DEVICE void wait_barrier(CopyBarrier* barrier, int parity,
                                cudasim::Site site = cudasim::Site::here()) {
  cudasim::wait_barrier(barrier, parity, site);
}

// --- Asynchronous copies of boxes of a matrix ----------------------------------------------------

struct TensorMap {
  TensorMapShape shape;
  bool is_encoded = false;
};

// Null, or what is wrong.
const char* encode_tensor_map(const TensorMapShape& shape, TensorMap* map);

// Starts to copy the box whose first element is at `column` and `row` to a multiple of 128, row by
// row. Elements of it that are not in the matrix become zero. The barrier counts all bytes of the
// box.
FASTBN_DEVICE void bulk_copy_2d(void* shared, const TensorMap* map, int column, int row,
                                CopyBarrier* barrier) {
  cudasim::bulk_copy_2d(shared, map, column, row, barrier);
}

// --- Stores to blocks of the cluster -------------------------------------------------------------

// Stores 4, 8 or 16 bytes where a block of the cluster has what the calling block has at `own`. The
// bytes count for the barrier that it has where the calling block has `own_barrier`.
template <typename T>
FASTBN_DEVICE void store_async(T* own, int rank, const T& value, CopyBarrier* own_barrier,
                               cudasim::Site site = cudasim::Site::here()) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  cudasim::store_async(own, rank, &value, sizeof(T), own_barrier, site);
}

// Like wait_barrier(), for a barrier that blocks of the cluster store to: what they have stored is
// visible after.
FASTBN_DEVICE void wait_barrier_cluster(CopyBarrier* barrier, int parity,
                                        cudasim::Site site = cudasim::Site::here()) {
  cudasim::wait_barrier_cluster(barrier, parity, site);
}

// --- Bulk stores from shared to global memory ----------------------------------------------------

// Makes what this thread has written to shared memory visible to the copy engine.
FASTBN_DEVICE void fence_async_proxy() { cudasim::fence_async_proxy(); }

// Starts to store a range: addresses and bytes are multiples of 16.
FASTBN_DEVICE void bulk_store(void* global, const void* shared, int bytes) {
  cudasim::bulk_store(global, shared, bytes);
}

// Starts to store the box whose first element is at `column` and `row` from a multiple of 128, row
// by row. Elements of it that are not in the matrix are left out.
FASTBN_DEVICE void bulk_store_2d(const TensorMap* map, int column, int row, const void* shared) {
  cudasim::bulk_store_2d(map, column, row, shared);
}

// Makes a group of what this thread has stored since the last one.
FASTBN_DEVICE void commit_bulk_stores() { cudasim::commit_bulk_stores(); }

// Waits until all groups of this thread but the last kPending have been read from shared memory.
template <int kPending>
FASTBN_DEVICE void wait_bulk_stores_read() {
  cudasim::wait_bulk_stores_read(kPending);
}

// --- 16-bit floating point -----------------------------------------------------------------------

FASTBN_DEVICE double widen(double value) { return value; }
FASTBN_DEVICE float widen(float value) { return value; }
FASTBN_DEVICE float widen(BFloat16 value) { return cudasim::float_from_bfloat16(value.bits); }
FASTBN_DEVICE float widen(Float16 value) { return cudasim::float_from_float16(value.bits); }
template <int kCount, typename scalar_t, typename acc_t>
FASTBN_DEVICE void widen(const scalar_t (&from)[kCount], acc_t (&to)[kCount]) {
  for (int i = 0; i < kCount; ++i) to[i] = widen(from[i]);
}

template <int kCount>
FASTBN_DEVICE void narrow(const double (&from)[kCount], double (&to)[kCount]) {
  for (int i = 0; i < kCount; ++i) to[i] = from[i];
}
template <int kCount>
FASTBN_DEVICE void narrow(const float (&from)[kCount], float (&to)[kCount]) {
  for (int i = 0; i < kCount; ++i) to[i] = from[i];
}
template <int kCount>
FASTBN_DEVICE void narrow(const float (&from)[kCount], BFloat16 (&to)[kCount]) {
  for (int i = 0; i < kCount; ++i) to[i].bits = cudasim::bfloat16_from_float(from[i]);
}
template <int kCount>
FASTBN_DEVICE void narrow(const float (&from)[kCount], Float16 (&to)[kCount]) {
  for (int i = 0; i < kCount; ++i) to[i].bits = cudasim::float16_from_float(from[i]);
}

// --- Elementary functions ------------------------------------------------------------------------

FASTBN_DEVICE float divide(float dividend, float divisor) { return dividend / divisor; }
FASTBN_DEVICE double divide(double dividend, double divisor) { return dividend / divisor; }
FASTBN_DEVICE float exp(float value) { return std::exp(value); }
FASTBN_DEVICE double exp(double value) { return std::exp(value); }
FASTBN_DEVICE float expm1(float value) { return std::expm1(value); }
FASTBN_DEVICE double expm1(double value) { return std::expm1(value); }
FASTBN_DEVICE float normal_cdf(float value) {
  return 0.5f * std::erfc(value * -0.70710678118654752440f);
}
FASTBN_DEVICE double normal_cdf(double value) {
  return 0.5 * std::erfc(value * -0.70710678118654752440);
}

// --- Two kernels in a row ------------------------------------------------------------------------

// Kernels run one after another here, but one that overlaps may not touch writable memory before it
// has waited.
FASTBN_DEVICE void allow_next_kernel() { cudasim::allow_next_kernel(); }
FASTBN_DEVICE void wait_for_previous_kernel() { cudasim::wait_for_previous_kernel(); }

// --- Launching -----------------------------------------------------------------------------------

struct StreamState;
using Stream = StreamState*;

template <typename... Parameters>
bool is_code_for_hopper(void (*)(Parameters...)) {
  return true;
}

// How many blocks of a shape fit a multiprocessor.
template <typename... Parameters>
int active_blocks(const LaunchShape& shape, void (*)(Parameters...)) {
  return cudasim::active_blocks(shape.threads, shape.shared_bytes);
}

// How many clusters of a shape run at once.
template <typename... Parameters>
int active_clusters(const LaunchShape& shape, void (*)(Parameters...)) {
  return cudasim::active_clusters(shape.cluster_blocks, shape.threads, shape.shared_bytes);
}

// Null, or what is wrong. Throws what a thread of the kernel does.
template <typename... Parameters>
const char* launch(Stream, const LaunchShape& shape, void (*kernel)(Parameters...),
                   const Parameters&... arguments) {
  const auto call = [&] { kernel(arguments...); };
  using Call = decltype(call);
  return cudasim::run(
      shape, reinterpret_cast<const void*>(kernel),
      [](const void* body) { (*static_cast<std::remove_reference_t<Call>*>(body))(); }, &call);
}

}  // namespace fastbn::gpu
