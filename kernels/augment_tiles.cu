// Augmentation for slices whose sides are multiples of 32: the work of augment.cu, in an order that suits a GPU.
//
// Eight elements in a row make 32 pixels, 256 a tile of 32 x 32: so a block of threads reads a slice that is turned by
// a quarter from few rows, and a warp (4 rows of 32 pixels) writes whole sectors of memory. An element makes four
// neighbouring pixels of the image, which share their random blocks. Of 64-bit labels it makes two pairs, 16 pixels
// apart, so that what eight elements write at once lies side by side.
#include "augment.h"

enum { kTileSide = 32, kQuadsPerTileRow = kTileSide / 4, kQuadsPerTile = kTileSide * kQuadsPerTileRow };
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

// Four neighbouring pixels of an encoded channel, of which the first is at `index` and the others `step` further on
// each. Steps of one are read at once: such a run starts, or ends, at a multiple of four.
GP_FN void load_run(const uint8_t *GP_RESTRICT channel, int32_t index, int32_t step, float *values) {
  if (step == 1 || step == -1) {
    const uint32_t word = ((const Bytes4 *)(channel + (step == 1 ? index : index - 3)))->words[0];
    GP_UNROLL for (int32_t i = 0; i < 4; ++i) values[i] = (float)(word >> 8 * (step == 1 ? i : 3 - i) & 255u);
    return;
  }
  GP_UNROLL for (int32_t i = 0; i < 4; ++i) values[i] = (float)channel[index + i * step];
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

GP_FN float load_tap(const uint8_t *GP_RESTRICT channel, int32_t row, int32_t column) {
  return row + column < 0 ? 0.0f : (float)channel[row + column];
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

// One of the two directions in which a plane of native labels is read.
struct LabelAxis {
  const int32_t *nearest;  // encoded coordinate -> padded one
  int32_t pad, length;     // zeros before the slice, and its length
  int32_t block_length;    // of a tile
  int64_t stride;          // bytes from one place to the next inside a tile
  int32_t block_step;      // from one tile to the next in the table of tiles
};

GP_FN LabelAxis label_axis(const Plane &plane, const int32_t *GP_RESTRICT nearest, int32_t nearest_length,
                           bool is_row) {
  if (is_row)
    return {nearest + (int64_t)plane.row_table * nearest_length,
            plane.pad_top,
            plane.height,
            plane.block_height,
            plane.row_stride,
            plane.blocks_per_row};
  return {nearest + (int64_t)plane.column_table * nearest_length,
          plane.pad_left,
          plane.width,
          plane.block_width,
          plane.column_stride,
          1};
}

// A place along an axis: its tile's part of a number in the table of tiles (-1: padding), and its bytes into the tile.
struct LabelPlace {
  int32_t tile;
  int64_t offset;
};

GP_FN LabelPlace label_place(const LabelAxis &axis, int32_t encoded) {
  const int32_t place = axis.nearest[encoded] - axis.pad;
  if (place < 0 || place >= axis.length) return {-1, 0};
  const int32_t tile = place < axis.block_length ? 0 : place / axis.block_length;
  return {tile * axis.block_step, (place - tile * axis.block_length) * axis.stride};
}

// Ids of four pixels of one output row: augmentation's geometry and encoding's composed, both nearest. A row of the
// output runs along one axis of the native labels and stands at one place of the other.
GP_FN void find_ids(const uint8_t *GP_RESTRICT arena, const int64_t *GP_RESTRICT blocks, const Plane &plane,
                    const int32_t *GP_RESTRICT nearest, int32_t nearest_length, const AugmentParams &params,
                    const int32_t *crop_table, const CropTables &tables, const Symmetry &symmetry, int32_t height,
                    int32_t width, int32_t y, const int32_t *xs, uint32_t *ids) {
  GP_UNROLL for (int32_t i = 0; i < 4; ++i) ids[i] = 0;
  if (params.zero) return;
  if (params.crop) y = params.crop_top + tables.nearest[(int64_t)crop_table[0] * tables.length + y];
  if (y < 0 || y >= height) return;
  const bool turned = params.rotate & 1;  // then a row of the output is a column of the slice
  const LabelAxis across = label_axis(plane, nearest, nearest_length, !turned);
  const LabelAxis along = label_axis(plane, nearest, nearest_length, turned);
  const LabelPlace line = label_place(
      across, turned ? symmetry.origin.x + y * symmetry.down.x : symmetry.origin.y + y * symmetry.down.y);
  if (line.tile < 0) return;
  const int64_t *line_blocks = blocks + plane.first_block + line.tile;
  const int32_t origin = turned ? symmetry.origin.y : symmetry.origin.x;
  const int32_t step = turned ? symmetry.right.y : symmetry.right.x;
  int32_t tile = -1;
  int64_t start = -1;
  GP_UNROLL for (int32_t i = 0; i < 4; ++i) {
    int32_t x = xs[i];
    if (params.crop) x = params.crop_left + tables.nearest[(int64_t)crop_table[1] * tables.length + x];
    if (x < 0 || x >= width) continue;
    const LabelPlace place = label_place(along, origin + x * step);
    if (place.tile < 0) continue;
    if (place.tile != tile) tile = place.tile, start = line_blocks[tile];
    if (start < 0) continue;
    const uint32_t id = load_unsigned(arena + start + line.offset + place.offset, plane.itemsize);
    ids[i] = params.wrap_ids ? id & 255u : id;
  }
}

GP_FN void augment_tiles_element(int64_t element, GP_AUGMENT_PARAMETERS) {
  const int32_t num_pixels = height * width;
  const int32_t num_quads = num_pixels / 4;
  const int32_t sample = (int32_t)gp_divide(element, num_quads);
  const int32_t number = (int32_t)(element - (int64_t)sample * num_quads);
  const int32_t tile = number / kQuadsPerTile, inside = number % kQuadsPerTile;
  const int32_t tile_row = tile / (width / kTileSide);
  const int32_t y = tile_row * kTileSide + inside / kQuadsPerTileRow;
  const int32_t tile_x = (tile - tile_row * (width / kTileSide)) * kTileSide;
  const int32_t column = inside % kQuadsPerTileRow;
  const int32_t x = tile_x + 4 * column;
  const int32_t quad = (y * width + x) / 4;

  const AugmentParams &params = all_params[sample];
  const int32_t *crop_table = crop_tables + 2 * sample;
  const CropTables tables = {linear_index, linear_weight, crop_nearest, crop_length};
  const Symmetry symmetry = find_symmetry(params, height, width);
  const PhiloxWords salt = salt_words(params, quad);
  CropTaps taps = {};
  const bool crop = params.crop && !params.zero;
  if (crop) taps = find_crop_taps(params, crop_table, tables, symmetry, height, width, y, x);
  const int32_t step = symmetry.right.y * width + symmetry.right.x;
  const int32_t index = (symmetry.origin.y + y * symmetry.down.y + x * symmetry.right.y) * width + symmetry.origin.x +
                        y * symmetry.down.x + x * symmetry.right.x;
  GP_UNROLL for (int32_t channel = 0; channel < 3; ++channel) {
    const uint8_t *source = images + ((int64_t)sample * 3 + channel) * num_pixels;
    float values[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (crop)
      GP_UNROLL for (int32_t i = 0; i < 4; ++i) values[i] = crop_pixel(source, taps, i, params.crop_round);
    else if (!params.zero)
      load_run(source, index, step, values);
    change_intensity(params, quad, channel, salt, values);
    const int32_t target = params.swap && channel ? 3 - channel : channel;
    store_image(out_image, ((int64_t)sample * 3 + target) * num_pixels + 4 * quad, values, 4, true, image_type);
  }

  const bool pairs = label_type == kLabelsInt64;
  const int32_t first_x = pairs ? tile_x + 2 * column : x;
  const int32_t second_x = first_x + (pairs ? kTileSide / 2 : 2);
  const int32_t xs[4] = {first_x, first_x + 1, second_x, second_x + 1};
  uint32_t ids[4];
  find_ids(arena, blocks, label_planes[sample], nearest, nearest_length, params, crop_table, tables, symmetry, height,
           width, y, xs, ids);
  const int32_t mode = label_modes[sample];
  for (int32_t prompt = 0; prompt < num_prompts; ++prompt) {
    const int32_t prompt_id = prompt_ids[sample * num_prompts + prompt];
    const int64_t pixel = ((int64_t)sample * num_prompts + prompt) * num_pixels + y * width;
    uint32_t labels[4];  // of 64 bits the upper half is 0: ids have 32
    GP_UNROLL for (int32_t i = 0; i < 4; ++i) labels[i] = (uint32_t)label_value(ids[i], mode, prompt_id);
    if (pairs) {
      gp_stream((int64_t *)out_labels + pixel + first_x, Bytes16{{labels[0], 0, labels[1], 0}});
      gp_stream((int64_t *)out_labels + pixel + second_x, Bytes16{{labels[2], 0, labels[3], 0}});
    } else {
      gp_stream((uint8_t *)out_labels + pixel + x,
                Bytes4{{(labels[0] & 255u) | (labels[1] & 255u) << 8 | (labels[2] & 255u) << 16 | labels[3] << 24}});
    }
  }
}

GP_KERNEL(augment_tiles, (GP_AUGMENT_PARAMETERS), (GP_AUGMENT_ARGUMENTS))
