// Evaluation's preparation: planes at native size -> uint8 (num_planes, out_height, out_width), bicubic, A = -0.75.
//
// The arithmetic is torch.nn.functional.interpolate(mode="bicubic") on uint8: two passes in fixed point, columns first,
// each rounded to uint8. All of it is whole numbers, so CPU and GPU agree by construction. Torch adds the weights of
// taps beyond the edge to the edge pixel before it rounds them; the tables (gpuparse/evaluation/resampling.py) hold
// weights after that, which is why an output may have fewer than four taps. What is left over has weight 0.
#include "planes.h"

// One table resamples one source length to one output length: entry d begins at source position table_first[table][d],
// has the weights table_weights[table][0..3][d], and counts them in units of 2^-table_bits[table].

GP_FN uint8_t round_fixed(int32_t sum, int32_t bits) {
  const int32_t value = sum >> bits;
  return (uint8_t)gp_min(gp_max(value, 0), 255);
}

GP_FN int32_t fixed_sum(int32_t p0, int32_t p1, int32_t p2, int32_t p3, int32_t w0, int32_t w1, int32_t w2, int32_t w3,
                        int32_t bits) {
  return (1 << (bits - 1)) + p0 * w0 + p1 * w1 + p2 * w2 + p3 * w3;
}

GP_FN void prepare_element(int64_t element, const uint8_t *GP_RESTRICT arena, const int64_t *GP_RESTRICT blocks,
                           const Plane *GP_RESTRICT planes, const int32_t *GP_RESTRICT table_first,
                           const int32_t *GP_RESTRICT table_weights, const int32_t *GP_RESTRICT table_bits,
                           int32_t table_length, int32_t out_height, int32_t out_width, uint8_t *GP_RESTRICT out) {
  const int32_t out_x = (int32_t)(element % out_width);
  const int64_t row = element / out_width;
  const int32_t out_y = (int32_t)(row % out_height);
  const Plane plane = planes[row / out_height];
  if (plane.padded_height == out_height && plane.padded_width == out_width) {
    out[element] = (uint8_t)plane_value(arena, blocks, plane, out_y, out_x);
    return;
  }
  const int32_t first_x = table_first[(int64_t)plane.column_table * table_length + out_x];
  const int32_t first_y = table_first[(int64_t)plane.row_table * table_length + out_y];
  const int32_t *column_weights = table_weights + (int64_t)plane.column_table * 4 * table_length + out_x;
  const int32_t *row_weights = table_weights + (int64_t)plane.row_table * 4 * table_length + out_y;
  const int32_t column_bits = table_bits[plane.column_table];
  const int32_t row_bits = table_bits[plane.row_table];
  const int64_t stride = table_length;
  int32_t rows[4];
  for (int32_t j = 0; j < 4; ++j) {
    const int32_t y = gp_min(first_y + j, plane.padded_height - 1);
    int32_t taps[4];
    for (int32_t i = 0; i < 4; ++i)
      taps[i] = (int32_t)plane_value(arena, blocks, plane, y, gp_min(first_x + i, plane.padded_width - 1));
    rows[j] = round_fixed(fixed_sum(taps[0], taps[1], taps[2], taps[3], column_weights[0], column_weights[stride],
                                    column_weights[2 * stride], column_weights[3 * stride], column_bits),
                          column_bits);
  }
  out[element] = round_fixed(fixed_sum(rows[0], rows[1], rows[2], rows[3], row_weights[0], row_weights[stride],
                                       row_weights[2 * stride], row_weights[3 * stride], row_bits),
                             row_bits);
}

GP_KERNEL(prepare,
          (const uint8_t *GP_RESTRICT arena, const int64_t *GP_RESTRICT blocks, const Plane *GP_RESTRICT planes,
           const int32_t *GP_RESTRICT table_first, const int32_t *GP_RESTRICT table_weights,
           const int32_t *GP_RESTRICT table_bits, int32_t table_length, int32_t out_height, int32_t out_width,
           uint8_t *GP_RESTRICT out),
          (arena, blocks, planes, table_first, table_weights, table_bits, table_length, out_height, out_width, out))
