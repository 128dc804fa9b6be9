// Fractal volumetric encoding, the image half: planes at native size -> uint8 (num_planes, out_height, out_width).
//
// Bicubic with A = -0.75 in the arithmetic that cv2.resize(INTER_CUBIC) has on x86 for uint8 (its IPP path):
// horizontal first, (p0*w0 + p1*w1) + (p2*w2 + p3*w3), then vertical with two fused multiply-adds, round half to
// even, saturate. The weights come from tables that the host computes in double precision (gpuparse/views.py).
#ifndef GP_MIN_BLOCKS
#define GP_MIN_BLOCKS 6  // most of the time goes into waiting, for memory and for one another
#endif
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

// A block of threads makes a tile of the output: first it collects the pixels of the padded slice under the tile, as
// floats, then each thread makes a column of it from them, top to bottom.
// Mirrored by num_image_elements in gpuparse/encode.py.
enum { kTileRows = 32, kTileColumns = kBlockThreads };

struct GP_WIDE(16) TapWeights {
  float w[4];
};

struct GP_WIDE(16) RowTaps {
  TapWeights weights;
  int32_t index;
};

struct EncodeShared {
  RowTaps rows[kTileRows];
  float pixels[9216];  // six blocks fit on a multiprocessor of 228 KiB
};
enum { kMostPixels = sizeof(EncodeShared::pixels) / sizeof(float) };

// One row of the padded slice: what lies in one of its tiles is found at once.
struct SliceRow {
  const uint8_t *pixels;  // of that tile: from `first` on there are `count`
  int32_t first, count;
  const int64_t *tiles;  // null: a row of padding
  int64_t down;          // bytes from a tile's start to this row
};

GP_FN SliceRow find_row(const uint8_t *arena, const int64_t *blocks, const Plane &plane, int32_t padded_y,
                        int32_t padded_x) {
  const int32_t y = padded_y - plane.pad_top;
  if (y < 0 || y >= plane.height) return {nullptr, 0, 0, nullptr, 0};
  const int32_t tile_y = y < plane.block_height ? 0 : y / plane.block_height;
  const int64_t *tiles = blocks + plane.first_block + (int64_t)tile_y * plane.blocks_per_row;
  const int64_t down = (y - tile_y * plane.block_height) * plane.row_stride;
  const int32_t x = gp_nearest(padded_x - plane.pad_left, plane.width);
  const int32_t tile_x = x < plane.block_width ? 0 : x / plane.block_width;
  const int32_t first = tile_x * plane.block_width;
  const int64_t start = tiles[tile_x];
  if (start < 0) return {nullptr, first, 0, tiles, down};
  return {arena + start + down, first, gp_min(plane.block_width, plane.width - first), tiles, down};
}

// Where a pixel of it lies; null: it is 0.
GP_FN const uint8_t *find_pixel(const uint8_t *arena, const SliceRow &row, const Plane &plane, int32_t padded_x) {
  const int32_t x = padded_x - plane.pad_left;
  const uint32_t stride = (uint32_t)plane.column_stride;
  const int32_t inside = x - row.first;
  if ((uint32_t)inside < (uint32_t)row.count) return row.pixels + (uint64_t)(uint32_t)inside * stride;
  if (!row.tiles || x < 0 || x >= plane.width) return nullptr;
  const int32_t tile = x / plane.block_width;
  const int64_t start = row.tiles[tile];
  return start < 0 ? nullptr : arena + start + row.down + (uint64_t)(uint32_t)(x - tile * plane.block_width) * stride;
}

GP_FN uint32_t read_pixel(const uint8_t *arena, const SliceRow &row, const Plane &plane, int32_t padded_x) {
  const uint8_t *pixel = find_pixel(arena, row, plane, padded_x);
  return pixel ? gp_load(pixel) : 0;
}

// Pixels `left`, `left` + 1 ... of it as floats; those outside the padded slice are the nearest inside. Several loads
// of a thread are under way at once.
GP_FN void collect_row(const uint8_t *arena, const SliceRow &row, const Plane &plane, int32_t left, int32_t count,
                       int32_t lane, float *pixels) {
  enum { kAtOnce = 4 };
  GP_LOOP for (int32_t i = lane; i < count; i += kAtOnce * kWarpThreads) {
    uint32_t values[kAtOnce];
    GP_UNROLL for (int32_t k = 0; k < kAtOnce; ++k) {
      const int32_t x = gp_nearest(left + i + k * kWarpThreads, plane.padded_width);
      values[k] = i + k * kWarpThreads < count ? read_pixel(arena, row, plane, x) : 0;
    }
    GP_UNROLL for (int32_t k = 0; k < kAtOnce; ++k) if (i + k * kWarpThreads < count)
        pixels[i + k * kWarpThreads] = gp_byte_float(values[k]);
  }
}

// A tile of a slice that has the output's size already.
GP_FN void copy_tile(int32_t thread, const uint8_t *arena, const int64_t *blocks, const Plane &plane, int32_t first_y,
                     int32_t first_x, int32_t num_rows, int32_t num_columns, int32_t out_width, uint8_t *out) {
  // Of words where it is one piece of one of the slice's tiles, and they lie at multiples of their size.
  const SliceRow top = find_row(arena, blocks, plane, first_y, first_x);
  const int32_t x = first_x - plane.pad_left - top.first;
  const int32_t y = first_y - plane.pad_top;
  const bool whole = x >= 0 && x + num_columns <= top.count && plane.column_stride == 1 &&
                     y + num_rows <= plane.height && y % plane.block_height + num_rows <= plane.block_height;
  const uint64_t places = ((uint64_t)top.pixels + x) | (uint64_t)plane.row_stride | (uint64_t)out;
  if (whole && (places | (uint64_t)(out_width | num_columns)) % 4 == 0) {
    enum { kWords = kTileColumns / 4 };
    if (thread % kWords * 4 >= num_columns) return;
    const uint8_t *source = top.pixels + x + thread / kWords * plane.row_stride + thread % kWords * 4;
    out += (int64_t)(thread / kWords) * out_width + thread % kWords * 4;
    GP_UNROLL for (int32_t i = 0; i < kTileRows; i += kBlockThreads / kWords) if (thread / kWords + i < num_rows) *
        (Bytes4 *)(out + (int64_t)i * out_width) = {{gp_load((const Bytes4 *)(source + i * plane.row_stride))}};
    return;
  }
  GP_LOOP for (int32_t i = thread / kWarpThreads; i < num_rows; i += kBlockThreads / kWarpThreads) {
    const SliceRow row = find_row(arena, blocks, plane, first_y + i, first_x);
    GP_LOOP for (int32_t j = thread % kWarpThreads; j < num_columns; j += kWarpThreads)
        out[(int64_t)i * out_width + j] = (uint8_t)read_pixel(arena, row, plane, first_x + j);
  }
}

struct CubicTable {
  const int32_t *GP_RESTRICT index;
  const float *GP_RESTRICT weights;
  int32_t length;
};

GP_FN CubicTable cubic_table(const int32_t *GP_RESTRICT table_index, const float *GP_RESTRICT table_weights,
                             int32_t table_length, int32_t number) {
  return {table_index + (int64_t)number * table_length, table_weights + (int64_t)number * 4 * table_length,
          table_length};
}

GP_FN TapWeights tap_weights(const CubicTable &table, int32_t place) {
  const float *weights = table.weights + place;
  return {{weights[0], weights[table.length], weights[2 * (int64_t)table.length], weights[3 * (int64_t)table.length]}};
}

GP_FN float cubic_row(const float *pixels, const TapWeights &weights) {
  return cubic_horizontal(pixels[0], pixels[1], pixels[2], pixels[3], weights.w[0], weights.w[1], weights.w[2],
                          weights.w[3]);
}

// A pixel of the output by itself, where the slice is so large that what lies under a row of a tile cannot be kept.
GP_FN uint8_t encode_pixel(const uint8_t *arena, const int64_t *blocks, const Plane &plane,
                           const TapWeights &row_weights, const TapWeights &column_weights, int32_t top, int32_t left) {
  float r0 = 0.0f, r1 = 0.0f, r2 = 0.0f, r3 = 0.0f;
  GP_LOOP for (int32_t j = 0; j < 4; ++j) {
    const int32_t y = gp_nearest(top + j, plane.padded_height);
    const SliceRow row = find_row(arena, blocks, plane, y, gp_max(left, 0));
    float pixels[4];
    GP_UNROLL for (int32_t i = 0; i < 4; ++i)
        pixels[i] = gp_byte_float(read_pixel(arena, row, plane, gp_nearest(left + i, plane.padded_width)));
    r0 = r1, r1 = r2, r2 = r3, r3 = cubic_row(pixels, column_weights);
  }
  const float *b = row_weights.w;
  return saturate_uint8(cubic_vertical(r0, r1, r2, r3, b[0], b[1], b[2], b[3]));
}

// Collects the pixels under some rows of a tile: `height` rows of `width` from (top, left) of the padded slice on.
GP_FN void collect_pixels(int32_t thread, const uint8_t *arena, const int64_t *blocks, const Plane &plane, int32_t top,
                          int32_t left, int32_t height, int32_t width, float *pixels) {
  GP_LOOP for (int32_t i = thread / kWarpThreads; i < height; i += kBlockThreads / kWarpThreads) {
    const int32_t y = gp_nearest(top + i, plane.padded_height);
    const SliceRow row = find_row(arena, blocks, plane, y, gp_max(left, 0));
    collect_row(arena, row, plane, left, width, thread % kWarpThreads, pixels + i * width);
  }
}

// Makes a column of these rows, from its taps in the first row of pixels on, which is row `top` of the slice; each row
// of pixels is resampled once on the way down.
GP_FN void make_column(const RowTaps *rows, int32_t num_rows, int32_t top, const float *taps, int32_t width,
                       const TapWeights &weights, int32_t out_width, uint8_t *out) {
  float r0 = 0.0f, r1 = 0.0f, r2 = 0.0f, r3 = 0.0f;  // the four under the taps
  int32_t row = top;
  GP_LOOP for (int32_t i = num_rows; i > 0; --i, ++rows, out += out_width) {
    const int32_t below = rows->index + 3;
    GP_LOOP for (; row < below; ++row, taps += width) {
      r0 = r1, r1 = r2, r2 = r3;
      r3 = cubic_row(taps, weights);
    }
    *out = saturate_uint8(
        cubic_vertical(r0, r1, r2, r3, rows->weights.w[0], rows->weights.w[1], rows->weights.w[2], rows->weights.w[3]));
  }
}

GP_FN void encode_block(int64_t block, EncodeShared &shared, const uint8_t *GP_RESTRICT arena,
                        const int64_t *GP_RESTRICT blocks, const Plane *GP_RESTRICT planes,
                        const int32_t *GP_RESTRICT table_index, const float *GP_RESTRICT table_weights,
                        int32_t table_length, int32_t out_height, int32_t out_width, uint8_t *GP_RESTRICT out) {
  const int32_t tiles_across = (out_width + kTileColumns - 1) / kTileColumns;
  const int32_t tiles_down = (out_height + kTileRows - 1) / kTileRows;
  const int64_t line = gp_divide(block, tiles_across);
  const int32_t first_x = (int32_t)(block - line * tiles_across) * kTileColumns;
  const int32_t end_x = gp_min(first_x + kTileColumns, out_width);
  const int64_t number = gp_divide(line, tiles_down);
  const int32_t first_y = (int32_t)(line - number * tiles_down) * kTileRows;
  const int32_t num_rows = gp_min(kTileRows, out_height - first_y);
  const Plane plane = planes[number];
  out += (number * out_height + first_y) * out_width;
  if (plane.padded_height == out_height && plane.padded_width == out_width) {
    GP_THREADS(thread)
    copy_tile(thread, arena, blocks, plane, first_y, first_x, num_rows, end_x - first_x, out_width, out + first_x);
    return;
  }
  const CubicTable columns = cubic_table(table_index, table_weights, table_length, plane.column_table);
  const CubicTable rows = cubic_table(table_index, table_weights, table_length, plane.row_table);
  GP_THREADS(thread) if (thread < num_rows) {
    shared.rows[thread] = {tap_weights(rows, first_y + thread), rows.index[first_y + thread]};
  }
  const int32_t left = columns.index[first_x] - 1;
  const int32_t width = columns.index[end_x - 1] + 3 - left;
  const int32_t most_rows = kMostPixels / width;
  GP_LOOP for (int32_t begin = 0, end; begin < num_rows; begin = end) {
    const int32_t top = shared.rows[begin].index - 1;
    int32_t height = 0;  // of what lies under as many rows of the tile as there is space for
    GP_LOOP for (end = num_rows;; end = begin + (end - begin) / 2) {
      height = shared.rows[end - 1].index + 3 - top;
      if (height <= most_rows || end == begin + 1) break;
    }
    if (height > most_rows) {
      GP_THREADS(thread) {
        const int32_t x = first_x + thread;
        if (x < end_x)
          out[(int64_t)begin * out_width + x] = encode_pixel(arena, blocks, plane, shared.rows[begin].weights,
                                                             tap_weights(columns, x), top, columns.index[x] - 1);
      }
      continue;
    }
    GP_THREADS(thread) collect_pixels(thread, arena, blocks, plane, top, left, height, width, shared.pixels);
    GP_THREADS(thread) if (first_x + thread < end_x) {
      const int32_t x = first_x + thread;
      make_column(shared.rows + begin, end - begin, top, shared.pixels + (columns.index[x] - 1 - left), width,
                  tap_weights(columns, x), out_width, out + (int64_t)begin * out_width + x);
    }
  }
}

GP_BLOCK_KERNEL(encode, EncodeShared,
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
