// SPDX-License-Identifier: BSD-3-Clause
//
// Marks the functions of core/, which compile for the host and for a GPU. Always inlined: CPU loops
// are compiled once per instruction set, and the copy of a function that the linker keeps for all
// of them must not be one that only some processors can run. FASTBN_UNROLL unrolls a loop over
// lanes, of which the host has one, and FASTBN_UNROLL_TWICE lets a GPU take two rounds at once.
#pragma once

#if defined(__CUDACC__)
#define FASTBN_HOST_DEVICE __host__ __device__ __forceinline__
#define FASTBN_UNROLL _Pragma("unroll")
#define FASTBN_UNROLL_TWICE _Pragma("unroll 2")
#else
#define FASTBN_HOST_DEVICE inline __attribute__((always_inline))
#define FASTBN_UNROLL
#define FASTBN_UNROLL_TWICE
#endif
