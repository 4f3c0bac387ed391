// SPDX-License-Identifier: Apache-2.0
// The product of the queries and a tile of keys, both in shared memory, on the matrix units: mma.sync, or
// wgmma where Hopper has it. Either way lane l of warp w gets, of rows 16 w + l / 4 + {0, 8} and columns
// 8 j + 2 (l % 4) + {0, 1}, element sum[4 j + 2 (row half) + (column)]: the layout of the PTX ISA.
#pragma once
#include "cuda_problem.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(__CUDA_ARCH_SPECIFIC__) && __CUDA_ARCH_SPECIFIC__ == 900
#define VOSOPS_WGMMA 1
#else
#define VOSOPS_WGMMA 0
#endif

namespace vosops::gpu {

// Calls f(query matrix, key matrix, whether it is the first) for every product of parts: see parts_of. The
// matrices are 64 channels wide, four steps of 16; what the keys lack is 0.
template <bool Selection, class F>
VOSOPS_DEVICE void for_products(const Match& p, const Shared& shared, const F& f) {
  const int blocks = blocks_of(p.channels);
#pragma unroll
  for (int block = 0; block < kMaxBlocks; ++block) {
    if (block >= blocks) break;
#pragma unroll
    for (int product = 0; product < (Selection ? 4 : 1); ++product) {
      const int query_part = product == 3 ? 2 : product;
      const int key_part = product < 2 ? 0 : product - 1;
      f(shared.queries + (query_part * blocks + block) * kMatrixBytes,
        shared.keys + (key_part * blocks + block) * kMatrixBytes, product + block == 0);
    }
  }
}

template <class T, bool Selection>
VOSOPS_DEVICE void multiply_sync(const Match& p, const Shared& shared, float (&sum)[32]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) sum[i] = 0;
  const int l = lane(), row = warp() * 16 + l % 16, column = l % 8 + l / 16 * 8;
  for_products<Selection>(p, shared, [&](const uint8_t* queries, const uint8_t* keys, bool) {
#pragma unroll 1
    for (int step = 0; step < 4; ++step) {
      uint32_t a[4];
      load_matrices(a, queries + chunk_at(row, step * 2 + l / 16));
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        uint32_t b[4];
        load_matrices(b, keys + chunk_at(pair * 16 + column, step * 2 + l / 8 % 2));
        multiply<T>(sum + pair * 8, a, b[0], b[1]);
        multiply<T>(sum + pair * 8 + 4, a, b[2], b[3]);
      }
    }
  });
}

#if VOSOPS_WGMMA

// Shared-memory matrix descriptor: 64 rows of 128 bytes, 128-byte swizzle (1 in bits 62-63), 1024 bytes from
// 8 rows to the next (bits 32-45, in 16 bytes); the leading offset has no meaning in this layout. Matrices
// begin on 1024 bytes, so the base offset is 0 and 16 channels further is 32 bytes further.
VOSOPS_DEVICE uint64_t matrix_descriptor(const uint8_t* matrix) {
  return uint64_t((shared_address(matrix) & 0x3ffff) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 |
         uint64_t(1) << 62;
}

// sum = queries keys' (accumulate = 0) or sum += it; 64x64x16, by the four warps together.
template <class T>
VOSOPS_DEVICE void multiply_group(float (&d)[32], uint64_t queries, uint64_t keys, int accumulate) {
#define VOSOPS_WGMMA_TEXT(TYPE)                                                                         \
  asm volatile(                                                                                         \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                                      \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE                                       \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "    \
      "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, 0, 0;\n}\n"      \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),        \
        "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),      \
        "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),      \
        "+f"(d[29]), "+f"(d[30]), "+f"(d[31])                                                           \
      : "l"(queries), "l"(keys), "r"(accumulate))
  if constexpr (T::kHalf)
    VOSOPS_WGMMA_TEXT("f16");
  else
    VOSOPS_WGMMA_TEXT("bf16");
#undef VOSOPS_WGMMA_TEXT
}

// The product runs while the caller does something else; `sum` is defined after await_group.
template <class T, bool Selection>
VOSOPS_DEVICE void start_group(const Match& p, const Shared& shared, float (&sum)[32]) {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  for_products<Selection>(p, shared, [&](const uint8_t* queries, const uint8_t* keys, bool first) {
    const uint64_t a = matrix_descriptor(queries), b = matrix_descriptor(keys);
#pragma unroll
    for (int step = 0; step < 4; ++step)
      multiply_group<T>(sum, a + step * 2, b + step * 2, !first || step > 0);
  });
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

VOSOPS_DEVICE void await_group(float (&sum)[32]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int i = 0; i < 32; ++i) asm volatile("" : "+f"(sum[i])::"memory");
}

// What this thread wrote to shared memory becomes visible to wgmma, after the next barrier.
VOSOPS_DEVICE void publish_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#endif  // VOSOPS_WGMMA

}  // namespace vosops::gpu
