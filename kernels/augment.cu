// Augmentation for slices of any size: geometry, intensity, noise, channel swap and labels in one launch. Four pixels
// in a row of memory are one element. Sizes whose sides are multiples of 32 go through augment_tiles.cu.
#include "augment.h"

// Where a pixel of all channels comes from, after geometry: one pixel of the encoded slice, or the four around a point
// of the region that is cropped. A negative index is outside, and 0.
struct PixelSource {
  int32_t index[4];
  float row_weight, column_weight;
};

GP_FN PixelSource find_source(const AugmentParams &params, const int32_t *crop_table, const CropTables &tables,
                              int32_t height, int32_t width, int32_t y, int32_t x) {
  PixelSource source = {{-1, -1, -1, -1}, 0.0f, 0.0f};
  if (params.zero) return source;
  if (!params.crop) {
    const Position place = symmetry_source(params.rotate, params.flip, height, width, y, x);
    source.index[0] = place.y * width + place.x;
    return source;
  }
  const int64_t row_entry = (int64_t)crop_table[0] * tables.length + y;
  const int64_t column_entry = (int64_t)crop_table[1] * tables.length + x;
  GP_UNROLL for (int32_t j = 0; j < 4; ++j) {
    const int32_t down = j >> 1, right = j & 1;
    const int32_t region_y = params.crop_top + gp_min(tables.linear_index[row_entry] + down, params.crop_height - 1);
    const int32_t region_x = params.crop_left +
                             gp_min(tables.linear_index[column_entry] + right, params.crop_width - 1);
    if (region_y < 0 || region_y >= height || region_x < 0 || region_x >= width) continue;
    const Position place = symmetry_source(params.rotate, params.flip, height, width, region_y, region_x);
    source.index[j] = place.y * width + place.x;
  }
  source.row_weight = tables.linear_weight[row_entry];
  source.column_weight = tables.linear_weight[column_entry];
  return source;
}

GP_FN float load_source(const uint8_t *GP_RESTRICT channel, int32_t index) {
  return index < 0 ? 0.0f : (float)channel[index];
}

// A pixel of one encoded channel after geometry, before intensity.
GP_FN float geometric_pixel(const uint8_t *GP_RESTRICT channel, const AugmentParams &params,
                            const PixelSource &source) {
  if (params.zero || !params.crop) return load_source(channel, source.index[0]);
  const float top = lerp(load_source(channel, source.index[0]), load_source(channel, source.index[1]),
                         source.column_weight);
  const float bottom = lerp(load_source(channel, source.index[2]), load_source(channel, source.index[3]),
                            source.column_weight);
  const float value = lerp(top, bottom, source.row_weight);
  return params.crop_round ? gp_round_even(value) : value;
}

// The id under a pixel: augmentation's geometry and encoding's composed, both nearest, read from the native labels.
GP_FN uint32_t geometric_label(const uint8_t *GP_RESTRICT arena, const int64_t *GP_RESTRICT blocks, const Plane &plane,
                               const int32_t *GP_RESTRICT nearest, int32_t nearest_length, const AugmentParams &params,
                               const int32_t *crop_table, const CropTables &tables, int32_t height, int32_t width,
                               int32_t y, int32_t x) {
  if (params.zero) return 0;
  if (params.crop) {
    y = params.crop_top + tables.nearest[(int64_t)crop_table[0] * tables.length + y];
    x = params.crop_left + tables.nearest[(int64_t)crop_table[1] * tables.length + x];
    if (y < 0 || x < 0 || y >= height || x >= width) return 0;
  }
  const Position source = symmetry_source(params.rotate, params.flip, height, width, y, x);
  const uint32_t id = plane_value(arena, blocks, plane, nearest[(int64_t)plane.row_table * nearest_length + source.y],
                                  nearest[(int64_t)plane.column_table * nearest_length + source.x]);
  return params.wrap_ids ? id & 255u : id;
}

// One element is four consecutive pixels of one sample, in all channels and labels: they share their random blocks.
GP_FN void augment_element(int64_t element, GP_AUGMENT_PARAMETERS) {
  const int32_t num_pixels = height * width;
  const int32_t num_quads = (num_pixels + 3) / 4;
  const int64_t sample = gp_divide(element, num_quads);
  const int32_t quad = (int32_t)(element - sample * num_quads);
  const AugmentParams params = all_params[sample];
  const int32_t *crop_table = crop_tables + 2 * sample;
  const CropTables tables = {linear_index, linear_weight, crop_nearest, crop_length};
  const int32_t first = quad * 4;
  const int32_t count = gp_min(4, num_pixels - first);
  const bool wide = num_pixels % 4 == 0;  // every group is whole and lies at a multiple of its size

  const PhiloxWords salt = salt_words(params, quad);
  float values[3][4];
  uint32_t ids[4];
  const Plane plane = label_planes[sample];
  int32_t y = first / width;
  int32_t x = first - y * width;
  GP_UNROLL for (int32_t i = 0; i < 4; ++i) {
    const PixelSource source = find_source(params, crop_table, tables, height, width, y, x);
    GP_UNROLL for (int32_t channel = 0; channel < 3; ++channel)
        values[channel][i] = geometric_pixel(images + (sample * 3 + channel) * num_pixels, params, source);
    ids[i] = geometric_label(arena, blocks, plane, nearest, nearest_length, params, crop_table, tables, height, width,
                             y, x);
    if (i + 1 >= count) continue;  // behind the image's end: the last pixel again, not stored
    if (++x == width) x = 0, ++y;
  }
  GP_UNROLL for (int32_t channel = 0; channel < 3; ++channel) {
    const int32_t target = params.swap && channel ? 3 - channel : channel;
    change_intensity(params, quad, channel, salt, values[channel]);
    store_image(out_image, (sample * 3 + target) * num_pixels + first, values[channel], count, wide, image_type);
  }
  for (int32_t prompt = 0; prompt < num_prompts; ++prompt) {
    int64_t labels[4];
    GP_UNROLL for (int32_t i = 0; i < 4; ++i)
        labels[i] = label_value(ids[i], label_modes[sample], prompt_ids[sample * num_prompts + prompt]);
    store_labels(out_labels, (sample * num_prompts + prompt) * num_pixels + first, labels, count, wide, label_type);
  }
}

GP_KERNEL(augment, (GP_AUGMENT_PARAMETERS), (GP_AUGMENT_ARGUMENTS))
