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

GP_FN uint8_t saturate_uint8(float value) {
  const float rounded = gp_round_even(value);
  const float low = rounded > 0.0f ? rounded : 0.0f;
  return (uint8_t)(int32_t)(low < 255.0f ? low : 255.0f);
}

// Rows of output that one element makes, one below the other: neighbours share most of their source rows.
// Mirrored by STRIP_ROWS in gpuparse/encode.py.
enum { kStripRows = 16 };

// A column of a plane: the tile it runs through in every row of tiles (-1: padding), and its bytes into a tile's row.
struct PlaneColumn {
  int32_t tile;
  int64_t offset;
};

// A row of a plane: the first of the tiles it runs through (-1: padding), and its bytes into a tile.
struct PlaneRow {
  int64_t first_tile;
  int64_t offset;
};

GP_FN PlaneColumn find_column(const Plane &plane, int32_t padded_x) {
  const int32_t x = padded_x - plane.pad_left;
  if (x < 0 || x >= plane.width) return {-1, 0};
  const int32_t tile = x < plane.block_width ? 0 : x / plane.block_width;
  return {tile, (x - tile * plane.block_width) * plane.column_stride};
}

GP_FN PlaneRow find_row(const Plane &plane, int32_t padded_y) {
  const int32_t y = padded_y - plane.pad_top;
  if (y < 0 || y >= plane.height) return {-1, 0};
  const int32_t tile = y < plane.block_height ? 0 : y / plane.block_height;
  return {plane.first_block + (int64_t)tile * plane.blocks_per_row, (y - tile * plane.block_height) * plane.row_stride};
}

GP_FN uint8_t load_pixel(const uint8_t *GP_RESTRICT arena, const int64_t *GP_RESTRICT blocks, const PlaneRow &row,
                         const PlaneColumn &column) {
  if (row.first_tile < 0 || column.tile < 0) return 0;
  const int64_t start = blocks[row.first_tile + column.tile];
  return start < 0 ? 0 : arena[start + row.offset + column.offset];
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
  const Plane plane = planes[number];
  out += (number * out_height + first_y) * out_width + out_x;
  if (plane.padded_height == out_height && plane.padded_width == out_width) {
    const PlaneColumn column = find_column(plane, out_x);
    for (int32_t y = first_y; y < end_y; ++y, out += out_width)
      *out = load_pixel(arena, blocks, find_row(plane, y), column);
    return;
  }
  const int64_t column_base = (int64_t)plane.column_table * table_length + out_x;
  const int32_t tap_x = table_index[column_base] - 1;
  const float *weights = table_weights + (int64_t)plane.column_table * 4 * table_length + out_x;
  PlaneColumn columns[4];
  float column_weights[4];
  for (int32_t i = 0; i < 4; ++i) {
    columns[i] = find_column(plane, gp_min(gp_max(tap_x + i, 0), plane.padded_width - 1));
    column_weights[i] = weights[(int64_t)i * table_length];
  }
  const auto resampled = [&](int32_t y) {
    const PlaneRow row = find_row(plane, gp_min(gp_max(y, 0), plane.padded_height - 1));
    float taps[4];
    for (int32_t i = 0; i < 4; ++i) taps[i] = (float)load_pixel(arena, blocks, row, columns[i]);
    return cubic_horizontal(taps[0], taps[1], taps[2], taps[3], column_weights[0], column_weights[1], column_weights[2],
                            column_weights[3]);
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
