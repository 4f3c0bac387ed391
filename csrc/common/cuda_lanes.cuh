// SPDX-License-Identifier: Apache-2.0
// What a lane can do with the lanes around it. Everything the device code needs beyond C++ is here, so that
// a host build can put an emulation in its place (tests/cuda_emulation) and test the rest without a GPU.
#pragma once
#include <cstdint>

#ifndef __CUDACC__
#include "cuda_emulation.h"
#else
#define VOSOPS_DEVICE __device__ __forceinline__
#define VOSOPS_ANYWHERE __host__ __device__

namespace vosops::gpu {

constexpr uint32_t kAll = 0xffffffffu;

VOSOPS_DEVICE int thread_index() { return int(threadIdx.x); }
VOSOPS_DEVICE int block_x() { return int(blockIdx.x); }
VOSOPS_DEVICE int block_y() { return int(blockIdx.y); }
VOSOPS_DEVICE int block_z() { return int(blockIdx.z); }

VOSOPS_DEVICE void sync_block() { __syncthreads(); }
VOSOPS_DEVICE bool any_of_block(bool p) { return __syncthreads_or(p) != 0; }  // synchronises too
VOSOPS_DEVICE void sync_warp() { __syncwarp(); }
VOSOPS_DEVICE bool any(bool p) { return __any_sync(kAll, p); }
VOSOPS_DEVICE uint32_t ballot(bool p) { return __ballot_sync(kAll, p); }
template <class V>
VOSOPS_DEVICE V shuffle(V value, int from) {
  return __shfl_sync(kAll, value, from);
}
template <class V>
VOSOPS_DEVICE V shuffle_xor(V value, int mask) {
  return __shfl_xor_sync(kAll, value, mask);
}
VOSOPS_DEVICE uint32_t largest_of_warp(uint32_t x) { return __reduce_max_sync(kAll, x); }
VOSOPS_DEVICE uint32_t least_of_warp(uint32_t x) { return __reduce_min_sync(kAll, x); }

VOSOPS_DEVICE void raise_to(uint32_t* to, uint32_t x) { atomicMax(to, x); }

VOSOPS_DEVICE int count_bits(uint32_t x) { return __popc(x); }
VOSOPS_DEVICE int lowest_bit(uint32_t x) { return __ffs(int(x)) - 1; }
VOSOPS_DEVICE uint32_t bytes_of(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}
VOSOPS_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
VOSOPS_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

// NaN if either is: fmaxf would drop it.
VOSOPS_DEVICE float largest(float a, float b) {
  float out;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
}

VOSOPS_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Four 8x8 matrices of 16-bit elements; lane l passes row l % 8 of matrix l / 8.
VOSOPS_DEVICE void load_matrices(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same, each matrix transposed.
VOSOPS_DEVICE void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// Starts a copy of 16 bytes into shared memory, of zeros unless `inside`; `from` must be global either way.
VOSOPS_DEVICE void start_copy(void* to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(inside ? 16 : 0)
               : "memory");
}
// Closes a group of copies; await_copies returns when all of this thread's but the last kLeft are there.
VOSOPS_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
VOSOPS_DEVICE void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// c += a b, 16x8 += 16x16 16x8; T::kHalf says the type of a and b.
template <class T>
VOSOPS_DEVICE void multiply(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (T::kHalf)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace vosops::gpu
#endif

namespace vosops::gpu {

VOSOPS_DEVICE int lane() { return thread_index() & 31; }
VOSOPS_DEVICE int warp() { return thread_index() >> 5; }

}  // namespace vosops::gpu
