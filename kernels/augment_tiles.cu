// Augmentation for slices whose sides are multiples of 32: the work of augment.cu, in an order that suits a GPU.
//
// A block of threads makes a tile of 32 x 32: so it reads a slice that is turned by a quarter from few rows, and a warp
// (4 rows of 32 pixels) writes whole sectors of memory. A thread makes four neighbouring pixels, which share their
// random blocks. Where a tile's rows and columns of labels come from is found once for all pixels in them, while image
// pixels are on their way. Of 64-bit labels a thread makes two pairs, 16 pixels apart, so that what eight threads write
// at once lies side by side.
#include "augment.h"

enum { kTileSide = 32, kQuadsPerTileRow = kTileSide / 4 };
enum { kOutside = -(1 << 30) };  // stays negative whatever offset inside a slice is added to it

// Pixel (y, x) of the turned and flipped slice comes from origin + y * down + x * right.
struct Symmetry {
  Position origin, down, right;
};

GP_FN Symmetry find_symmetry(const AugmentParams &params, int32_t height, int32_t width) {
  const Position origin = symmetry_source(params.rotate, params.flip, height, width, 0, 0);
  const Position down = symmetry_source(params.rotate, params.flip, height, width, 1, 0);
  const Position right = symmetry_source(params.rotate, params.flip, height, width, 0, 1);
  return {origin, {down.y - origin.y, down.x - origin.x}, {right.y - origin.y, right.x - origin.x}};
}

// Four pixels of an encoded channel, of which the first is at `index` and the others `step` further on each, in the
// bytes of a word. Steps of one are read at once: such a run starts, or ends, at a multiple of four.
GP_FN uint32_t load_run(const uint8_t *GP_RESTRICT channel, int32_t index, int32_t step) {
  if (step == 1) return ((const Bytes4 *)(channel + index))->words[0];
  if (step == -1) return gp_reverse_bytes(((const Bytes4 *)(channel + index - 3))->words[0]);
  return channel[index] | (uint32_t)channel[index + step] << 8 | (uint32_t)channel[index + 2 * step] << 16 |
         (uint32_t)channel[index + 3 * step] << 24;
}

GP_FN float load_tap(const uint8_t *GP_RESTRICT channel, int32_t row, int32_t column) {
  return row + column < 0 ? 0.0f : gp_byte_float(channel[row + column]);
}

// What four neighbouring pixels of a crop are made from: parts of an index, the sum of a row's and a column's, and
// weights. A part outside the slice is kOutside.
struct CropTaps {
  int32_t rows[2];
  int32_t columns[4][2];
  float row_weight, column_weights[4];
};

GP_FN CropTaps find_crop_taps(const AugmentParams &params, const int32_t *crop_table, const CropTables &tables,
                              const Symmetry &symmetry, int32_t height, int32_t width, int32_t y, int32_t first_x) {
  const int32_t origin = symmetry.origin.y * width + symmetry.origin.x;
  const int32_t down = symmetry.down.y * width + symmetry.down.x;
  const int32_t right = symmetry.right.y * width + symmetry.right.x;
  const int64_t row_entry = (int64_t)crop_table[0] * tables.length + y;
  const int64_t column_entry = (int64_t)crop_table[1] * tables.length + first_x;
  CropTaps taps;
  taps.row_weight = tables.linear_weight[row_entry];
  GP_UNROLL for (int32_t j = 0; j < 2; ++j) {
    const int32_t row = params.crop_top + gp_min(tables.linear_index[row_entry] + j, params.crop_height - 1);
    taps.rows[j] = row < 0 || row >= height ? kOutside : origin + row * down;
  }
  GP_UNROLL for (int32_t i = 0; i < 4; ++i) {
    const int32_t left = tables.linear_index[column_entry + i];
    taps.column_weights[i] = tables.linear_weight[column_entry + i];
    GP_UNROLL for (int32_t j = 0; j < 2; ++j) {
      const int32_t column = params.crop_left + gp_min(left + j, params.crop_width - 1);
      taps.columns[i][j] = column < 0 || column >= width ? kOutside : column * right;
    }
  }
  return taps;
}

GP_FN float crop_pixel(const uint8_t *GP_RESTRICT channel, const CropTaps &taps, int32_t i, bool round) {
  const float weight = taps.column_weights[i];
  const float top = lerp(load_tap(channel, taps.rows[0], taps.columns[i][0]),
                         load_tap(channel, taps.rows[0], taps.columns[i][1]), weight);
  const float bottom = lerp(load_tap(channel, taps.rows[1], taps.columns[i][0]),
                            load_tap(channel, taps.rows[1], taps.columns[i][1]), weight);
  const float value = lerp(top, bottom, taps.row_weight);
  return round ? gp_round_even(value) : value;
}

// Four pixels of all channels, the first at (y, x), from the encoded slice to the output. Where there is no crop, all
// that is read is asked for before anything is done with it.
GP_FN void augment_pixels(const uint8_t *GP_RESTRICT slice, const AugmentParams &params, const int32_t *crop_table,
                          const CropTables &tables, const Symmetry &symmetry, int32_t height, int32_t width, int32_t y,
                          int32_t x, int32_t image_type, void *GP_RESTRICT out, int64_t element) {
  const int32_t num_pixels = height * width;
  float values[3][4] = {};
  if (params.crop && !params.zero) {
    const CropTaps taps = find_crop_taps(params, crop_table, tables, symmetry, height, width, y, x);
    GP_LOOP for (int32_t channel = 0; channel < 3; ++channel, slice += num_pixels)
        GP_UNROLL for (int32_t i = 0; i < 4; ++i) {
      values[0][i] = values[1][i], values[1][i] = values[2][i];
      values[2][i] = crop_pixel(slice, taps, i, params.crop_round);
    }
  } else {
    const int32_t step = symmetry.right.y * width + symmetry.right.x;
    const int32_t index = (symmetry.origin.y + y * symmetry.down.y) * width + symmetry.origin.x + y * symmetry.down.x +
                          x * step;
    uint32_t words[3] = {0, 0, 0};
    if (!params.zero)
      GP_UNROLL for (int32_t channel = 0; channel < 3; ++channel)
          words[channel] = load_run(slice + (int64_t)channel * num_pixels, index, step);
    GP_UNROLL for (int32_t channel = 0; channel < 3; ++channel) GP_UNROLL for (int32_t i = 0; i < 4; ++i)
        values[channel][i] = gp_byte_float(words[channel], i);
  }
  const int32_t first = params.swap ? 2 * num_pixels : num_pixels, second = 3 * num_pixels - first;
  if (!params.noise_mode && !params.salt_threshold) {
    GP_UNROLL for (int32_t channel = 0; channel < 3; ++channel) GP_UNROLL for (int32_t i = 0; i < 4; ++i)
        values[channel][i] = gp_add(values[channel][i], params.shift);
    store_image(out, element, values[0], 4, true, image_type);
    store_image(out, element + first, values[1], 4, true, image_type);
    store_image(out, element + second, values[2], 4, true, image_type);
    return;
  }
  const int32_t quad = (int32_t)((uint32_t)(y * width + x) / 4);
  const PhiloxWords salt = salt_words(params, quad);
  GP_LOOP for (int32_t channel = 0; channel < 3; ++channel) {
    change_intensity(params, quad, channel, salt, values[0]);
    store_image(out, element + (channel == 0 ? 0 : channel == 1 ? first : second), values[0], 4, true, image_type);
    GP_UNROLL for (int32_t i = 0; i < 4; ++i) values[0][i] = values[1][i], values[1][i] = values[2][i];
  }
}

// Where the labels of a tile's columns or rows come from, augmentation's geometry and encoding's composed, both
// nearest: parts of a number in the table of the native slice's tiles (-1: no label there), and parts of the bytes into
// that tile.
struct LabelSources {
  int32_t tiles[kTileSide];
  int64_t offsets[kTileSide];
};

struct TileShared {
  LabelSources columns, rows;
};

GP_FN void find_labels(const AugmentParams &params, const int32_t *crop_table, const CropTables &tables,
                       const Symmetry &symmetry, const Plane &plane, const int32_t *GP_RESTRICT nearest,
                       int32_t nearest_length, int32_t length, bool is_row, int32_t place, int32_t i,
                       LabelSources &sources) {
  sources.tiles[i] = -1;
  sources.offsets[i] = 0;
  if (params.zero) return;
  if (params.crop)
    place = (is_row ? params.crop_top : params.crop_left) +
            tables.nearest[(int64_t)crop_table[is_row ? 0 : 1] * tables.length + place];
  if (place < 0 || place >= length) return;
  const Position step = is_row ? symmetry.down : symmetry.right;
  const bool down = step.y != 0;  // along the rows of the native slice, or along its columns
  const int32_t encoded = down ? symmetry.origin.y + place * step.y : symmetry.origin.x + place * step.x;
  const int32_t native = nearest[(int64_t)(down ? plane.row_table : plane.column_table) * nearest_length + encoded] -
                         (down ? plane.pad_top : plane.pad_left);
  if (native < 0 || native >= (down ? plane.height : plane.width)) return;
  const int32_t tile_length = down ? plane.block_height : plane.block_width;
  const int32_t tile = native < tile_length ? 0 : native / tile_length;
  sources.tiles[i] = down ? tile * plane.blocks_per_row : tile;
  sources.offsets[i] = (native - tile * tile_length) * (down ? plane.row_stride : plane.column_stride);
}

// The ids under two pairs of neighbouring pixels of a row, the first at `pair_x` and the second `gap` further right.
// Where no row meets several tiles, a row's offset counts from the arena.
GP_FN void load_ids(const uint8_t *GP_RESTRICT arena, const int64_t *GP_RESTRICT tile_starts, int32_t itemsize,
                    bool tiles_are_rows, const TileShared &shared, int32_t row, int32_t pair_x, int32_t gap,
                    uint32_t *ids) {
  const int32_t row_tile = shared.rows.tiles[row];
  if (row_tile < 0) return;
  const int64_t row_offset = shared.rows.offsets[row];
  GP_UNROLL for (int32_t i = 0; i < 4; ++i) {
    const int32_t x = pair_x + (i < 2 ? i : gap + i - 2);
    const int32_t column_tile = shared.columns.tiles[x];
    if (column_tile < 0) continue;
    int64_t offset = row_offset + shared.columns.offsets[x];
    if (!tiles_are_rows) {
      const int64_t start = tile_starts[row_tile + column_tile];
      if (start < 0) continue;
      offset += start;
    }
    ids[i] = load_unsigned(arena + offset, itemsize);
  }
}

GP_FN void prompt_labels(const uint32_t *ids, int32_t mode, int32_t prompt_id, uint32_t *labels) {
  GP_UNROLL for (int32_t i = 0; i < 4; ++i) labels[i] = (uint32_t)label_value(ids[i], mode, prompt_id);
}

// Writes what four ids are to each prompt: two pairs of 64 bits, 16 pixels apart, or four bytes, `step` bytes from one
// prompt to the next. Of 64 bits the upper half is 0: ids have 32. A prompt is under way while one is written.
GP_FN void store_prompts(const uint32_t *ids, int32_t mode, const int32_t *GP_RESTRICT prompts, int32_t num_prompts,
                         bool pairs, int64_t step, uint8_t *GP_RESTRICT target) {
  int32_t prompt_id = prompts[0];
  uint32_t labels[4];
  if (pairs) {
    GP_LOOP for (int32_t i = 0; i < num_prompts; ++i, target += step) {
      prompt_labels(ids, mode, prompt_id, labels);
      prompt_id = prompts[gp_min(i + 1, num_prompts - 1)];
      gp_stream(target, Bytes16{{labels[0], 0, labels[1], 0}});
      gp_stream(target + kTileSide / 2 * sizeof(int64_t), Bytes16{{labels[2], 0, labels[3], 0}});
    }
    return;
  }
  GP_LOOP for (int32_t i = 0; i < num_prompts; ++i, target += step) {
    prompt_labels(ids, mode, prompt_id, labels);
    prompt_id = prompts[gp_min(i + 1, num_prompts - 1)];
    gp_stream(target,
              Bytes4{{(labels[0] & 255u) | (labels[1] & 255u) << 8 | (labels[2] & 255u) << 16 | labels[3] << 24}});
  }
}

GP_FN void augment_tiles_block(int64_t block, TileShared &shared, GP_AUGMENT_PARAMETERS) {
  const int32_t num_pixels = height * width;
  const int32_t across = width / kTileSide;
  const int32_t num_tiles = num_pixels / kTileSide / kTileSide;
  const int32_t sample = (int32_t)gp_divide(block, num_tiles);
  const int32_t number = (int32_t)(block - (int64_t)sample * num_tiles);
  const int32_t tile_y = number / across * kTileSide;
  const int32_t tile_x = number % across * kTileSide;
  const AugmentParams &params = all_params[sample];
  const Plane &plane = label_planes[sample];
  const int64_t *tile_starts = blocks + plane.first_block;
  const bool turned = params.rotate & 1;  // then a row of the output is a column of the slice
  const bool tiles_are_rows = turned ? plane.height <= plane.block_height : plane.width <= plane.block_width;

  GP_THREADS(thread) {
    const int32_t *crop_table = crop_tables + 2 * sample;
    const CropTables tables = {linear_index, linear_weight, crop_nearest, crop_length};
    const Symmetry symmetry = find_symmetry(params, height, width);
    const int32_t i = thread % kTileSide;
    if (thread < kTileSide) {
      find_labels(params, crop_table, tables, symmetry, plane, nearest, nearest_length, width, false, tile_x + i, i,
                  shared.columns);
    } else if (thread < 2 * kTileSide) {
      find_labels(params, crop_table, tables, symmetry, plane, nearest, nearest_length, height, true, tile_y + i, i,
                  shared.rows);
      if (tiles_are_rows && shared.rows.tiles[i] >= 0) {
        const int64_t start = tile_starts[shared.rows.tiles[i]];
        shared.rows.offsets[i] += start;
        if (start < 0) shared.rows.tiles[i] = -1;
      }
    }
    const int32_t y = tile_y + thread / kQuadsPerTileRow, x = tile_x + thread % kQuadsPerTileRow * 4;
    const int64_t start = (int64_t)sample * 3 * num_pixels;
    augment_pixels(images + start, params, crop_table, tables, symmetry, height, width, y, x, image_type, out_image,
                   start + y * width + x);
  }

  GP_THREADS(thread) {
    const bool pairs = label_type == kLabelsInt64;
    const int32_t row = thread / kQuadsPerTileRow;
    const int32_t pair_x = thread % kQuadsPerTileRow * (pairs ? 2 : 4);
    uint32_t ids[4] = {0, 0, 0, 0};
    load_ids(arena, tile_starts, plane.itemsize, tiles_are_rows, shared, row, pair_x, pairs ? kTileSide / 2 : 2, ids);
    if (params.wrap_ids) GP_UNROLL for (int32_t i = 0; i < 4; ++i) ids[i] &= 255u;
    const int32_t label_bytes = pairs ? sizeof(int64_t) : 1;
    const int64_t pixel = (int64_t)sample * num_prompts * num_pixels + (tile_y + row) * width + tile_x + pair_x;
    store_prompts(ids, label_modes[sample], prompt_ids + (int64_t)sample * num_prompts, num_prompts, pairs,
                  (int64_t)num_pixels * label_bytes, (uint8_t *)out_labels + pixel * label_bytes);
  }
}

GP_BLOCK_KERNEL(augment_tiles, TileShared, (GP_AUGMENT_PARAMETERS), (GP_AUGMENT_ARGUMENTS))
