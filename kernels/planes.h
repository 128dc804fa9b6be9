// A plane is one 2D slice of a chunked 3D array, read in place: no transposition, no assembled volume.
//
// The slice is cut into blocks, one per chunk it crosses. blocks[first_block + block_row * blocks_per_row +
// block_column] is the byte offset in the arena of that block's first pixel, or -1 where the chunk is missing (its
// pixels are 0, the store's fill value). Within a block, strides are in bytes, so that any view can be read.
#ifndef GPUPARSE_PLANES_H
#define GPUPARSE_PLANES_H

#include "portable.h"

// Mirrored by PLANE_DTYPE in gpuparse/views.py: the same fields in the same order, 80 bytes.
struct Plane {
  int64_t first_block;
  int64_t row_stride;     // bytes between rows inside a block
  int64_t column_stride;  // bytes between columns inside a block
  int32_t height;         // the slice at its native size
  int32_t width;
  int32_t block_height;
  int32_t block_width;
  int32_t blocks_per_row;
  int32_t itemsize;  // 1, 2 or 4 bytes; unsigned, little-endian
  int32_t pad_top;   // zeros above and left of the slice, which make it square
  int32_t pad_left;
  int32_t padded_height;
  int32_t padded_width;
  int32_t row_table;  // which resampling table serves the rows, which the columns
  int32_t column_table;
  int32_t reserved[2];
};

GP_FN uint32_t load_unsigned(const uint8_t *address, int32_t itemsize) {
  if (itemsize == 1) return *address;
  if (itemsize == 2) return *(const uint16_t *)address;
  return *(const uint32_t *)address;
}

// The value at (y, x) of the zero-padded slice; the caller keeps y and x inside the padded extent.
GP_FN uint32_t plane_value(const uint8_t *GP_RESTRICT arena, const int64_t *GP_RESTRICT blocks, const Plane &plane,
                           int32_t padded_y, int32_t padded_x) {
  const int32_t y = padded_y - plane.pad_top;
  const int32_t x = padded_x - plane.pad_left;
  if (y < 0 || x < 0 || y >= plane.height || x >= plane.width) return 0;
  const int32_t block_y = y < plane.block_height ? 0 : y / plane.block_height;
  const int32_t block_x = x < plane.block_width ? 0 : x / plane.block_width;
  const int64_t offset = blocks[plane.first_block + (int64_t)block_y * plane.blocks_per_row + block_x];
  if (offset < 0) return 0;
  const int64_t inside_y = y - block_y * plane.block_height;
  const int64_t inside_x = x - block_x * plane.block_width;
  return load_unsigned(arena + offset + inside_y * plane.row_stride + inside_x * plane.column_stride, plane.itemsize);
}

#endif  // GPUPARSE_PLANES_H
