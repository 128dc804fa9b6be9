// Fractal volumetric encoding, the image half: planes at native size -> uint8 (num_planes, out_height, out_width).
//
// Bicubic with A = -0.75 in the arithmetic that cv2.resize(INTER_CUBIC) has on x86 for uint8 (its IPP path):
// horizontal first, (p0*w0 + p1*w1) + (p2*w2 + p3*w3), then vertical with two fused multiply-adds, round half to
// even, saturate. The weights come from tables that the host computes in double precision (gpuparse/views.py).
#include "planes.h"

// One table resamples one source length to one output length: entry d has its second tap at table_index[table][d]
// and its four weights at table_weights[table][0..3][d]. table_length is the stride between tables.

GP_FN float cubic_horizontal(float p0, float p1, float p2, float p3, float w0, float w1, float w2, float w3) {
  return gp_add(gp_add(gp_mul(p0, w0), gp_mul(p1, w1)), gp_add(gp_mul(p2, w2), gp_mul(p3, w3)));
}

GP_FN float cubic_vertical(float r0, float r1, float r2, float r3, float b0, float b1, float b2, float b3) {
  return gp_add(gp_fma(r0, b0, gp_mul(r1, b1)), gp_fma(r2, b2, gp_mul(r3, b3)));
}

// Rounds half to even and saturates. At 2^23 a float's last bit is worth 1, so the sum is rounded as wanted and has the
// whole number in its low bits; a GPU converts four times as slowly as it adds.
GP_FN uint8_t saturate_uint8(float value) {
  const float low = value > 0.0f ? value : 0.0f;
  return (uint8_t)gp_float_bits(gp_add(low < 255.0f ? low : 255.0f, 8388608.0f));
}

// Rows of output that one element makes, one below the other: neighbours share most of their source rows.
// Mirrored by STRIP_ROWS in gpuparse/encode.py.
enum { kStripRows = 16 };

// A column of a plane: the tile it runs through in every row of tiles (-1: padding), and its bytes into a tile's row.
struct PlaneColumn {
  int32_t tile;
  int64_t offset;
};

GP_FN PlaneColumn find_column(const Plane &plane, int32_t padded_x) {
  const int32_t x = padded_x - plane.pad_left;
  if (x < 0 || x >= plane.width) return {-1, 0};
  const int32_t tile = x < plane.block_width ? 0 : x / plane.block_width;
  return {tile, (x - tile * plane.block_width) * plane.column_stride};
}

// Neighbouring columns of the padded slice that are read row by row: where each starts in the row of tiles at hand.
template <int32_t kColumns>
struct ColumnReader {
  int32_t first_column;             // those outside the padded slice stand for its border
  const uint8_t *starts[kColumns];  // null: 0
  int32_t first_row, end_row;       // of the slice, the rows of that row of tiles
};

template <int32_t kColumns>
GP_FN void enter_tiles(const uint8_t *GP_RESTRICT arena, const int64_t *GP_RESTRICT blocks, const Plane &plane,
                       int32_t y, ColumnReader<kColumns> &reader) {
  const int32_t tile = y < plane.block_height ? 0 : y / plane.block_height;
  const int64_t first = plane.first_block + (int64_t)tile * plane.blocks_per_row;
  reader.first_row = tile * plane.block_height;
  reader.end_row = reader.first_row + plane.block_height;
  GP_UNROLL for (int32_t i = 0; i < kColumns; ++i) {
    const int32_t x = gp_min(gp_max(reader.first_column + i, 0), plane.padded_width - 1);
    const PlaneColumn column = find_column(plane, x);
    const int64_t start = column.tile < 0 ? -1 : blocks[first + column.tile];
    reader.starts[i] = start < 0 ? nullptr : arena + start + column.offset;
  }
}

// The pixels of a row of the padded slice in the reader's columns.
template <int32_t kColumns>
GP_FN void read_row(const uint8_t *GP_RESTRICT arena, const int64_t *GP_RESTRICT blocks, const Plane &plane,
                    int32_t padded_y, ColumnReader<kColumns> &reader, uint8_t *pixels) {
  const int32_t y = padded_y - plane.pad_top;
  if (y < 0 || y >= plane.height) {
    GP_UNROLL for (int32_t i = 0; i < kColumns; ++i) pixels[i] = 0;
    return;
  }
  if (y < reader.first_row || y >= reader.end_row) enter_tiles(arena, blocks, plane, y, reader);
  const int64_t offset = (y - reader.first_row) * plane.row_stride;
  GP_UNROLL for (int32_t i = 0; i < kColumns; ++i) pixels[i] = reader.starts[i] ? reader.starts[i][offset] : 0;
}

GP_FN void encode_element(int64_t element, const uint8_t *GP_RESTRICT arena, const int64_t *GP_RESTRICT blocks,
                          const Plane *GP_RESTRICT planes, const int32_t *GP_RESTRICT table_index,
                          const float *GP_RESTRICT table_weights, int32_t table_length, int32_t out_height,
                          int32_t out_width, uint8_t *GP_RESTRICT out) {
  const int32_t num_strips = (out_height + kStripRows - 1) / kStripRows;
  const int64_t strip = gp_divide(element, out_width);
  const int32_t out_x = (int32_t)(element - strip * out_width);
  const int64_t number = gp_divide(strip, num_strips);
  const int32_t first_y = (int32_t)(strip - number * num_strips) * kStripRows;
  const int32_t end_y = gp_min(first_y + kStripRows, out_height);
  const Plane &plane = planes[number];
  out += (number * out_height + first_y) * out_width + out_x;
  if (plane.padded_height == out_height && plane.padded_width == out_width) {
    ColumnReader<1> reader = {out_x, {nullptr}, 0, 0};
    for (int32_t y = first_y; y < end_y; ++y, out += out_width) read_row(arena, blocks, plane, y, reader, out);
    return;
  }
  const int64_t column_base = (int64_t)plane.column_table * table_length + out_x;
  const float *weights = table_weights + (int64_t)plane.column_table * 4 * table_length + out_x;
  ColumnReader<4> reader = {table_index[column_base] - 1, {nullptr}, 0, 0};
  float column_weights[4];
  GP_UNROLL for (int32_t i = 0; i < 4; ++i) column_weights[i] = weights[(int64_t)i * table_length];
  const auto resampled = [&](int32_t y) {
    uint8_t taps[4];
    read_row(arena, blocks, plane, gp_min(gp_max(y, 0), plane.padded_height - 1), reader, taps);
    return cubic_horizontal((float)taps[0], (float)taps[1], (float)taps[2], (float)taps[3], column_weights[0],
                            column_weights[1], column_weights[2], column_weights[3]);
  };
  const int32_t *row_index = table_index + (int64_t)plane.row_table * table_length;
  const float *row_weights = table_weights + (int64_t)plane.row_table * 4 * table_length;
  // The four rows under the taps, from `top` on; each source row is resampled once on the way down.
  int32_t top = row_index[first_y] - 5;
  float r0 = 0.0f, r1 = 0.0f, r2 = 0.0f, r3 = 0.0f;
  for (int32_t y = first_y; y < end_y; ++y, out += out_width) {
    const int32_t wanted = row_index[y] - 1;
    top = gp_max(top, wanted - 4);
    for (; top < wanted; ++top) {
      r0 = r1, r1 = r2, r2 = r3;
      r3 = resampled(top + 4);
    }
    *out = saturate_uint8(cubic_vertical(r0, r1, r2, r3, row_weights[y], row_weights[table_length + y],
                                         row_weights[2 * (int64_t)table_length + y],
                                         row_weights[3 * (int64_t)table_length + y]));
  }
}

GP_KERNEL(encode,
          (const uint8_t *GP_RESTRICT arena, const int64_t *GP_RESTRICT blocks, const Plane *GP_RESTRICT planes,
           const int32_t *GP_RESTRICT table_index, const float *GP_RESTRICT table_weights, int32_t table_length,
           int32_t out_height, int32_t out_width, uint8_t *GP_RESTRICT out),
          (arena, blocks, planes, table_index, table_weights, table_length, out_height, out_width, out))

// The mask half: nearest neighbour, index table per source length. Ids keep their width up to 32 bits.
GP_FN void encode_mask_element(int64_t element, const uint8_t *GP_RESTRICT arena, const int64_t *GP_RESTRICT blocks,
                               const Plane *GP_RESTRICT planes, const int32_t *GP_RESTRICT nearest_index,
                               int32_t table_length, int32_t out_height, int32_t out_width, uint32_t *GP_RESTRICT out) {
  const int32_t out_x = (int32_t)(element % out_width);
  const int64_t row = element / out_width;
  const int32_t out_y = (int32_t)(row % out_height);
  const Plane plane = planes[row / out_height];
  const int32_t y = nearest_index[(int64_t)plane.row_table * table_length + out_y];
  const int32_t x = nearest_index[(int64_t)plane.column_table * table_length + out_x];
  out[element] = plane_value(arena, blocks, plane, y, x);
}

GP_KERNEL(encode_mask,
          (const uint8_t *GP_RESTRICT arena, const int64_t *GP_RESTRICT blocks, const Plane *GP_RESTRICT planes,
           const int32_t *GP_RESTRICT nearest_index, int32_t table_length, int32_t out_height, int32_t out_width,
           uint32_t *GP_RESTRICT out),
          (arena, blocks, planes, nearest_index, table_length, out_height, out_width, out))
