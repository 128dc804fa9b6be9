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
// Mirrored by num_strips in gpuparse/encode.py.
enum { kStripRows = 16 };
// And two columns, half a width apart: they share what is computed for a row.
enum { kStripColumns = 2 };

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

// Runs of neighbouring columns of the padded slice that are read row by row: where each column starts in the row of
// tiles at hand.
template <int32_t kTaps>
struct ColumnReader {
  int32_t first_columns[kStripColumns];         // those outside the padded slice stand for its border
  const uint8_t *starts[kStripColumns][kTaps];  // null: 0
  int32_t first_row, end_row;                   // of the slice, the rows of that row of tiles
};

template <int32_t kTaps>
GP_FN void enter_tiles(const uint8_t *GP_RESTRICT arena, const int64_t *GP_RESTRICT blocks, const Plane &plane,
                       int32_t y, ColumnReader<kTaps> &reader) {
  const int32_t tile = y < plane.block_height ? 0 : y / plane.block_height;
  const int64_t first = plane.first_block + (int64_t)tile * plane.blocks_per_row;
  reader.first_row = tile * plane.block_height;
  reader.end_row = reader.first_row + plane.block_height;
  GP_UNROLL for (int32_t k = 0; k < kStripColumns; ++k) GP_UNROLL for (int32_t i = 0; i < kTaps; ++i) {
    const int32_t x = gp_min(gp_max(reader.first_columns[k] + i, 0), plane.padded_width - 1);
    const PlaneColumn column = find_column(plane, x);
    const int64_t start = column.tile < 0 ? -1 : blocks[first + column.tile];
    reader.starts[k][i] = start < 0 ? nullptr : arena + start + column.offset;
  }
}

// The pixels of a row of the padded slice in the reader's columns.
template <int32_t kTaps>
GP_FN void read_row(const uint8_t *GP_RESTRICT arena, const int64_t *GP_RESTRICT blocks, const Plane &plane,
                    int32_t padded_y, ColumnReader<kTaps> &reader, uint8_t (&pixels)[kStripColumns][kTaps]) {
  const int32_t y = padded_y - plane.pad_top;
  if (y < 0 || y >= plane.height) {
    GP_UNROLL for (int32_t k = 0; k < kStripColumns; ++k) GP_UNROLL for (int32_t i = 0; i < kTaps; ++i)
        pixels[k][i] = 0;
    return;
  }
  if (y < reader.first_row || y >= reader.end_row) enter_tiles(arena, blocks, plane, y, reader);
  const int64_t offset = (y - reader.first_row) * plane.row_stride;
  GP_UNROLL for (int32_t k = 0; k < kStripColumns; ++k) GP_UNROLL for (int32_t i = 0; i < kTaps; ++i)
      pixels[k][i] = reader.starts[k][i] ? reader.starts[k][i][offset] : 0;
}

GP_FN void encode_element(int64_t element, const uint8_t *GP_RESTRICT arena, const int64_t *GP_RESTRICT blocks,
                          const Plane *GP_RESTRICT planes, const int32_t *GP_RESTRICT table_index,
                          const float *GP_RESTRICT table_weights, int32_t table_length, int32_t out_height,
                          int32_t out_width, uint8_t *GP_RESTRICT out) {
  const int32_t num_strips = (out_height + kStripRows - 1) / kStripRows;
  const int32_t half = (out_width + kStripColumns - 1) / kStripColumns;
  const int64_t strip = gp_divide(element, half);
  const int32_t out_x = (int32_t)(element - strip * half);
  // A width that is odd leaves the last element one column: its other one is made twice and not stored.
  const int32_t columns[kStripColumns] = {out_x, out_x + half < out_width ? out_x + half : out_x};
  const int64_t number = gp_divide(strip, num_strips);
  const int32_t first_y = (int32_t)(strip - number * num_strips) * kStripRows;
  const int32_t end_y = gp_min(first_y + kStripRows, out_height);
  const Plane &plane = planes[number];
  out += (number * out_height + first_y) * out_width;
  if (plane.padded_height == out_height && plane.padded_width == out_width) {
    ColumnReader<1> reader = {{columns[0], columns[1]}, {}, 0, 0};
    for (int32_t y = first_y; y < end_y; ++y, out += out_width) {
      uint8_t pixels[kStripColumns][1];
      read_row(arena, blocks, plane, y, reader, pixels);
      GP_UNROLL for (int32_t k = 0; k < kStripColumns; ++k) out[columns[k]] = pixels[k][0];
    }
    return;
  }
  const int32_t *column_index = table_index + (int64_t)plane.column_table * table_length;
  const float *weights = table_weights + (int64_t)plane.column_table * 4 * table_length;
  ColumnReader<4> reader = {{column_index[columns[0]] - 1, column_index[columns[1]] - 1}, {}, 0, 0};
  float column_weights[kStripColumns][4];
  GP_UNROLL for (int32_t k = 0; k < kStripColumns; ++k) GP_UNROLL for (int32_t i = 0; i < 4; ++i)
      column_weights[k][i] = weights[(int64_t)i * table_length + columns[k]];
  const int32_t *row_index = table_index + (int64_t)plane.row_table * table_length;
  const float *row_weights = table_weights + (int64_t)plane.row_table * 4 * table_length;
  // The four rows under the taps, from `top` on; each source row is resampled once on the way down.
  int32_t top = row_index[first_y] - 5;
  float rows[kStripColumns][4] = {};
  for (int32_t y = first_y; y < end_y; ++y, out += out_width) {
    const int32_t wanted = row_index[y] - 1;
    top = gp_max(top, wanted - 4);
    for (; top < wanted; ++top) {
      uint8_t taps[kStripColumns][4];
      read_row(arena, blocks, plane, gp_min(gp_max(top + 4, 0), plane.padded_height - 1), reader, taps);
      GP_UNROLL for (int32_t k = 0; k < kStripColumns; ++k) {
        rows[k][0] = rows[k][1], rows[k][1] = rows[k][2], rows[k][2] = rows[k][3];
        rows[k][3] = cubic_horizontal((float)taps[k][0], (float)taps[k][1], (float)taps[k][2], (float)taps[k][3],
                                      column_weights[k][0], column_weights[k][1], column_weights[k][2],
                                      column_weights[k][3]);
      }
    }
    const float b0 = row_weights[y], b1 = row_weights[table_length + y];
    const float b2 = row_weights[2 * (int64_t)table_length + y], b3 = row_weights[3 * (int64_t)table_length + y];
    GP_UNROLL for (int32_t k = 0; k < kStripColumns; ++k) out[columns[k]] = saturate_uint8(
        cubic_vertical(rows[k][0], rows[k][1], rows[k][2], rows[k][3], b0, b1, b2, b3));
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
