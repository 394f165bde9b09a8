// SPDX-License-Identifier: BSD-3-Clause
//
// The functions of csrc/cuda/gpu that wait and copy, each called once: what the compiler says of
// them on every architecture.
#include "../../csrc/cuda/gpu/async_copy.cuh"
#include "../../csrc/cuda/gpu/bulk_store.cuh"
#include "../../csrc/cuda/gpu/encode_tensor_map.cuh"
#include "../../csrc/cuda/gpu/store_async.cuh"

namespace fastbn::gpu {

FASTBN_KERNEL(128, 1) barriers(float* y, const int parity) {
  auto* barrier = static_cast<CopyBarrier*>(shared_memory());
  float* shared = reinterpret_cast<float*>(barrier + 1);
  const int thread = thread_index();
  if (thread == 0) init_barrier(barrier, block_threads());
  sync_block();
  store_shared(shared + thread, static_cast<float>(thread));
  arrive(barrier);
  if (thread == 0) wait_barrier(barrier, parity);
  store<CacheHint::kStream>(y + thread, load_shared(shared + thread));
}

FASTBN_KERNEL(128, 1) copies(const float* x, const int bytes) {
  auto* barrier = static_cast<CopyBarrier*>(shared_memory());
  copy_async(barrier + 2, x);
  arrive_when_copied(barrier);
  expect_bytes(barrier, bytes);
  bulk_copy(barrier + 2, x, bytes, barrier);
}

FASTBN_KERNEL(128, 1) bulk_stores(float* y, const int bytes) {
  float* shared = static_cast<float*>(shared_memory());
  store_shared(shared + thread_index(), 1.0f);
  fence_async_proxy();
  sync_block();
  bulk_store(y, shared, bytes);
  commit_bulk_stores();
  wait_bulk_stores_read<0>();
}

template <typename T>
FASTBN_DEVICE void store_to_peer(const int rank) {
  auto* barrier = static_cast<CopyBarrier*>(shared_memory());
  store_async(reinterpret_cast<T*>(barrier + 2) + rank, rank, T{}, barrier);
}

FASTBN_KERNEL(128, 1) peer_stores(const int rank, const int parity) {
  store_to_peer<float>(rank);
  store_to_peer<double>(rank);
  store_to_peer<Vector<double, 2>>(rank);
  wait_barrier_cluster(static_cast<CopyBarrier*>(shared_memory()), parity);
}

FASTBN_KERNEL(128, 1) boxes(FASTBN_PARAMETER TensorMap map, const int column, const int row) {
  auto* barrier = static_cast<CopyBarrier*>(shared_memory());
  bulk_copy_2d(barrier + 16, &map, column, row, barrier);
  bulk_store_2d(&map, column, row, barrier + 16);
}

const char* encode(const TensorMapShape& shape, TensorMap* map) {
  return encode_tensor_map(shape, map);
}

}  // namespace fastbn::gpu
