// SPDX-License-Identifier: Apache-2.0
// One call of local attention. No torch here.
#pragma once
#include "../common/operand.h"

namespace vosops {

// [batch, channel, row, column], any type and strides.
struct Map {
  const void* data = nullptr;
  DType dtype = DType::kFloat;
  int64_t batch_stride = 0, channel_stride = 0, row_stride = 0, column_stride = 0;
};

struct LocalProblem {
  int64_t batch = 0, height = 0, width = 0;
  int heads = 1, window = 1, dilation = 1;
  int channels = 0, value_channels = 0;  // of one head
  float scale = 1;
  Map query, key, value;
  Map bias;  // of the first head, its channels are offsets; data null without
  int64_t bias_head_stride = 0;
  const float* weight = nullptr;          // [head][offset][channel], or null
  const float* weight_offset = nullptr;   // [head][offset], or null
  const float* relative_value = nullptr;  // [head][value channel][offset], or null
};

// With dilation d a position meets only positions of its own residues (row mod d, column mod d). Each such
// class of a head is a plane: a map of its own, without dilation.
struct Plane {
  int64_t batch, head, first_row, first_column;  // on the whole map
  int64_t rows, columns;
};

// How the operands lie packed; floats everywhere. "Rows" hold [row][channel][border_row], the column x at
// reach + x between zeros; "cells" hold [chunk][row][column][width] with the last chunk's channels padded.
struct LocalLayout {
  int64_t classes_y = 1, classes_x = 1, planes = 0;
  int64_t rows = 0, columns = 0;  // of the largest plane
  int reach = 0;                  // window / 2
  int window_row = 0;             // one row of the window, padded to whole vectors
  int slots = 0;                  // key rows that a tile of queries meets
  int64_t border_row = 0;
  int key_width = 0, key_chunks = 0, value_width = 0, value_chunks = 0;
  int64_t blocks = 0, strips = 0;  // tiles of queries along the rows and columns of a plane
  int64_t strip = 0;               // columns of the largest tile

  int64_t key_rows(int64_t channels) const { return rows * channels * border_row; }  // floats of a plane
  int64_t cells(int chunks, int width) const { return rows * columns * chunks * width; }
  int64_t table(int chunks, int width) const { return int64_t(window()) * window_row * chunks * width; }
  int window() const { return 2 * reach + 1; }
};

// Packed operands; what is null is not packed.
struct LocalPack {
  float *key_rows = nullptr, *key_cells = nullptr;      // scaled
  float *value_rows = nullptr, *value_cells = nullptr;  //
  // The relative terms of every head: [dy][channel][window_row], and [chunk][dy][window_row][width].
  float *weight_rows = nullptr, *weight_cells = nullptr;
  float *relative_rows = nullptr, *relative_cells = nullptr;
  float* weight_offset = nullptr;  // [head][dy][window_row]
};

// What a segment, some tiles of a plane, adds to; every segment has its own.
struct LocalSegment {
  int64_t plane = 0, first_block = 0, last_block = 0;
  int64_t first_row = 0, last_row = 0;                 // of the keys it meets
  float *key_cells = nullptr, *value_cells = nullptr;  // [chunk][last_row - first_row][column][width]
  float *weight_cells = nullptr, *relative_cells = nullptr, *weight_offset = nullptr;  // null without
};

struct LocalGradients {
  Map read;                                      // gradient of the result, float
  const float *lse = nullptr, *delta = nullptr;  // [batch][head][row][column]
  float *query = nullptr, *bias = nullptr;       // as the tensors, contiguous; bias null without
};

}  // namespace vosops
