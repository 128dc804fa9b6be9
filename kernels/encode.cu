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

GP_FN void encode_element(int64_t element, const uint8_t *GP_RESTRICT arena, const int64_t *GP_RESTRICT blocks,
                          const Plane *GP_RESTRICT planes, const int32_t *GP_RESTRICT table_index,
                          const float *GP_RESTRICT table_weights, int32_t table_length, int32_t out_height,
                          int32_t out_width, uint8_t *GP_RESTRICT out) {
  const int32_t out_x = (int32_t)(element % out_width);
  const int64_t row = element / out_width;
  const int32_t out_y = (int32_t)(row % out_height);
  const Plane plane = planes[row / out_height];
  if (plane.padded_height == out_height && plane.padded_width == out_width) {
    out[element] = (uint8_t)plane_value(arena, blocks, plane, out_y, out_x);
    return;
  }
  const int64_t column_base = (int64_t)plane.column_table * table_length + out_x;
  const int64_t row_base = (int64_t)plane.row_table * table_length + out_y;
  const int32_t tap_x = table_index[column_base] - 1;
  const int32_t tap_y = table_index[row_base] - 1;
  const float *column_weights = table_weights + (int64_t)plane.column_table * 4 * table_length + out_x;
  const float *row_weights = table_weights + (int64_t)plane.row_table * 4 * table_length + out_y;
  float rows[4];
  for (int32_t j = 0; j < 4; ++j) {
    const int32_t y = gp_min(gp_max(tap_y + j, 0), plane.padded_height - 1);
    float taps[4];
    for (int32_t i = 0; i < 4; ++i) {
      const int32_t x = gp_min(gp_max(tap_x + i, 0), plane.padded_width - 1);
      taps[i] = (float)plane_value(arena, blocks, plane, y, x);
    }
    rows[j] = cubic_horizontal(taps[0], taps[1], taps[2], taps[3], column_weights[0], column_weights[table_length],
                               column_weights[2 * (int64_t)table_length], column_weights[3 * (int64_t)table_length]);
  }
  out[element] = saturate_uint8(cubic_vertical(rows[0], rows[1], rows[2], rows[3], row_weights[0],
                                               row_weights[table_length], row_weights[2 * (int64_t)table_length],
                                               row_weights[3 * (int64_t)table_length]));
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
