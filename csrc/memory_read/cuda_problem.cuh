// SPDX-License-Identifier: Apache-2.0
// One call of the top-k match as its kernels see it, and the shared memory of a block.
#pragma once
#include "../common/cuda_numbers.cuh"

namespace vosops::gpu {

constexpr int kThreads = 128;      // of a match block: four warps, 16 queries each
constexpr int kRows = 64;          // queries of a block
constexpr int kCols = 64;          // memory positions of a tile
constexpr int kMaxChannels = 128;  // of the keys
constexpr int kMaxTopK = 128;
constexpr int kSlots = 6;                  // entries of a row that a lane holds in a cut
constexpr int kMaxCapacity = 32 * kSlots;  // entries of a row before a cut
constexpr int kSpare = 32;                 // of them that half a tile may append
constexpr int kMatrixBytes = kRows * 128;  // 64 rows of 64 channels
constexpr int kMaxBlocks = kMaxChannels / 64;

// How keys lie in memory, and so how they are loaded.
enum class Run : int32_t {
  kChannels,    // channels innermost, 16-byte loads
  kPositions8,  // positions innermost, 16-byte loads
  kPositions4,  // positions innermost, 8-byte loads
  kScattered,   // anything else, one element at a time
};

inline Run run_of(const Operand& key) {
  const Positions& at = key.positions;
  const bool consecutive = at.dims == 1 && at.stride[0] == 1;
  // Whether rows along the innermost stride begin on multiples of `elements` 16-bit elements.
  const auto aligned = [&](int64_t elements) {
    bool yes =
        reinterpret_cast<uintptr_t>(key.data) % (elements * 2) == 0 && key.batch_stride % elements == 0;
    if (consecutive) return yes && key.channel_stride % elements == 0;
    for (int d = 0; d < at.dims; ++d) yes = yes && at.stride[d] % elements == 0;
    return yes;
  };
  if (consecutive) return aligned(8) ? Run::kPositions8 : aligned(4) ? Run::kPositions4 : Run::kScattered;
  return key.channel_stride == 1 && aligned(8) ? Run::kChannels : Run::kScattered;
}

struct Match {
  Operand query, key, shrinkage, selection;
  Operand mask;                      // bool; positions only
  const float* centers = nullptr;    // [B, M, 2] row, column
  const float* precision = nullptr;  // [B, M]
  int channels = 0, queries = 0, memory = 0, batch = 0;
  int grid_width = 1;  // of the queries
  bool l2 = false;
  float scale = 1;
  Run key_run = Run::kScattered;
  int k = 0, capacity = 0;
  // The tiles, every `stride`-th one of the memory, and how they are cut into shares.
  int tiles = 1, tile_stride = 1, splits = 1, split_tiles = 1;
  uint32_t* groups = nullptr;  // [B, Q, kCols] keys of the maxima of a sample; null: no sample
  uint64_t* kept = nullptr;    // [B, Q, splits, k] entries, unsorted, 0 where there is none
  int64_t* indices = nullptr;  // [B, Q, k]
  float* weights = nullptr;    // [B, Q, k]
};

// Cuts the tiles into at most `wanted` shares.
inline void cut_tiles(Match& p, int64_t wanted) {
  p.split_tiles = int((p.tiles + wanted - 1) / wanted);
  p.splits = (p.tiles + p.split_tiles - 1) / p.split_tiles;
}

// The launch before `p` over a sample of `tiles` of its tiles, in at most `wanted` shares.
inline Match sample_of(const Match& p, int tiles, int64_t wanted) {
  Match sample = p;
  sample.kept = nullptr;
  sample.tile_stride = p.tiles / tiles;
  sample.tiles = tiles;
  cut_tiles(sample, wanted);
  return sample;
}

// The score is a product of parts, because products of 16-bit channels are exact but their factors need
// more than 16 bits: with selection <2 e q, k> - <e, k^2> takes 2 e q and k^2 as two parts each.
VOSOPS_ANYWHERE constexpr int parts_of(bool selection) { return selection ? 3 : 1; }
VOSOPS_ANYWHERE constexpr int blocks_of(int channels) { return (channels + 63) / 64; }

// What a block knows of the columns of its tile.
struct Columns {
  float factor[kCols], bias[kCols];
  float precision[kCols], row[kCols], column[kCols];
  float constant[2][kRows];  // of the queries: sum_c e q^2, in two halves
  int state[kCols];
  int wide[kCols];  // the tile in which this column had a key whose square float16 cannot hold
  int wide_tile;    // the last tile with a wide column
};
enum ColumnState : int { kNormal, kSkipped, kWide };

VOSOPS_ANYWHERE constexpr int64_t shared_bytes(bool selection, int channels, int capacity) {
  return 2 * int64_t(parts_of(selection)) * blocks_of(channels) * kMatrixBytes +
         int64_t(kRows) * capacity * int(sizeof(uint64_t)) + int(sizeof(Columns));
}

struct Shared {
  uint8_t *queries, *keys;  // [part][block of 64 channels] matrices
  uint64_t* entries;        // [kRows][capacity]
  Columns* columns;

  VOSOPS_DEVICE Shared(uint8_t* base, bool selection, int channels, int capacity) {
    const int matrices = parts_of(selection) * blocks_of(channels);
    queries = base;
    keys = queries + matrices * kMatrixBytes;
    entries = reinterpret_cast<uint64_t*>(keys + matrices * kMatrixBytes);
    columns = reinterpret_cast<Columns*>(entries + kRows * capacity);
  }
};

// Byte of a matrix at which 8 channels of a row begin: rows of 128 bytes whose 16-byte chunks are swizzled,
// as the matrix units read them without bank conflicts (the 128-byte swizzle of the PTX ISA).
VOSOPS_DEVICE int chunk_at(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

}  // namespace vosops::gpu
