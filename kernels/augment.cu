// Augmentation and the last step of a sample: geometry, intensity, noise, channel swap and labels in one launch.
//
// The order is the reference's: quarter turns, flip, crop and resize (bilinear for the image, nearest for the mask),
// shift, Gaussian noise, salt and pepper, then the swap of channels 1 and 2. Parameters are drawn elsewhere
// (gpuparse/sampling.py); this file applies them.
#include "philox.h"
#include "planes.h"

// Mirrored by PARAMS_DTYPE in gpuparse/sampling.py: the same fields in the same order, 72 bytes.
struct AugmentParams {
  int32_t rotate;    // quarter turns counter-clockwise, 0..3
  int32_t flip;      // 0 none, 1 vertical (rows), 2 horizontal (columns), 3 both
  int32_t crop;      // 1: take the region below and resize it to the full size
  int32_t crop_top;  // the region in the turned and flipped image; what lies outside is 0
  int32_t crop_left;
  int32_t crop_height;
  int32_t crop_width;
  int32_t crop_round;  // 1: round to whole grey levels after resizing, as an 8-bit image would
  float shift;         // added to every pixel
  float noise_std;
  int32_t noise_mode;       // 0 none, 1 Gaussian, 2 Gaussian cut to 8 bits, 3 the same and the sum cut to 8 bits
  uint32_t salt_threshold;  // a pixel is hit where its 31-bit random number is below this
  int32_t swap;             // 1: channels 1 and 2 change places
  int32_t zero;             // 1: image and mask are 0 before anything else
  int32_t wrap_ids;         // 1: mask ids are cut to 8 bits
  uint32_t key0;            // the sample's random stream
  uint32_t key1;
  uint32_t stream_salt;
};

enum { kNoiseNone = 0, kNoiseGaussian = 1, kNoiseWrapped = 2, kNoiseWrappedSum = 3 };
enum { kLabelsPerPrompt = 0, kLabelsInstances = 1, kLabelsClasses = 2, kLabelsForeground = 3 };
enum { kImageFloat32 = 0, kImageFloat16 = 1, kImageBfloat16 = 2 };
enum { kLabelsInt64 = 0, kLabelsUint8 = 1 };

// The third counter word's meaning; the first values belong to gpuparse/plan.py.
enum { kOperationNoise = 16, kOperationSalt = 17 };

// Resampling of a crop: entry d of table t has the left tap and the right tap's weight, and the nearest index.
struct CropTables {
  const int32_t *GP_RESTRICT linear_index;
  const float *GP_RESTRICT linear_weight;
  const int32_t *GP_RESTRICT nearest;
  int32_t length;
};

struct Position {
  int32_t y, x;
};

// Where a pixel of the turned and flipped image comes from.
GP_FN Position symmetry_source(int32_t rotate, int32_t flip, int32_t height, int32_t width, int32_t y, int32_t x) {
  if (flip & 1) y = height - 1 - y;
  if (flip & 2) x = width - 1 - x;
  if (rotate == 1) return {x, width - 1 - y};
  if (rotate == 2) return {height - 1 - y, width - 1 - x};
  if (rotate == 3) return {height - 1 - x, y};
  return {y, x};
}

GP_FN float lerp(float a, float b, float weight) { return gp_add(gp_mul(a, gp_sub(1.0f, weight)), gp_mul(b, weight)); }

GP_FN float add_noise(float value, float normal, const AugmentParams &params) {
  const float noise = gp_mul(normal, params.noise_std);
  if (params.noise_mode == kNoiseGaussian) return gp_add(value, noise);
  const int32_t wrapped = (int32_t)noise & 255;  // towards zero, then modulo 256
  if (params.noise_mode == kNoiseWrapped) return gp_add(value, (float)wrapped);
  return (float)(((int32_t)value + wrapped) & 255);
}

GP_FN float salt_or(float value, uint32_t word, uint32_t threshold) {
  return (word >> 1) < threshold ? (word & 1 ? 255.0f : 0.0f) : value;
}

GP_FN uint16_t float_to_half(float value) {
  const uint32_t bits = gp_float_bits(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xfffu + (magnitude >> 13 & 1) - 0x38000000u) >> 13;
  const float scaled = gp_round_even(gp_mul(gp_bits_float(magnitude < 0x38800000u ? magnitude : 0u), 16777216.0f));
  const uint32_t subnormal = (uint32_t)(int32_t)scaled;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  if (magnitude >= 0x477ff000u) half = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return (uint16_t)(sign | half);
}

GP_FN uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = gp_float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x40u);
  return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

GP_FN uint32_t image_bits16(float value, int32_t image_type) {
  return image_type == kImageFloat16 ? float_to_half(value) : float_to_bfloat16(value);
}

// Writes `count` (1 to 4) pixels; `element` is a multiple of 4 where there are 4 and rows of 4 fill the image.
GP_FN void store_image(void *GP_RESTRICT out, int64_t element, const float *values, int32_t count, bool wide,
                       int32_t image_type) {
  if (image_type == kImageFloat32) {
    float *target = (float *)out + element;
    if (wide)
      gp_stream(target, Bytes16{{gp_float_bits(values[0]), gp_float_bits(values[1]), gp_float_bits(values[2]),
                                 gp_float_bits(values[3])}});
    else
      GP_UNROLL for (int32_t i = 0; i < 4; ++i) if (i < count) target[i] = values[i];
    return;
  }
  uint16_t *target = (uint16_t *)out + element;
  if (wide)
    gp_stream(target, Bytes8{{image_bits16(values[0], image_type) | image_bits16(values[1], image_type) << 16,
                              image_bits16(values[2], image_type) | image_bits16(values[3], image_type) << 16}});
  else
    GP_UNROLL for (int32_t i = 0; i < 4; ++i) if (i < count) target[i] = (uint16_t)image_bits16(values[i], image_type);
}

GP_FN int64_t label_value(uint32_t id, int32_t mode, int32_t prompt_id) {
  if (mode == kLabelsPerPrompt) return id == (uint32_t)prompt_id;
  if (mode == kLabelsForeground) return id ? prompt_id : 0;
  return id;
}

GP_FN void store_labels(void *GP_RESTRICT out, int64_t element, const int64_t *values, int32_t count, bool wide,
                        int32_t label_type) {
  if (label_type == kLabelsInt64) {
    int64_t *target = (int64_t *)out + element;
    if (wide)
      GP_UNROLL for (int32_t i = 0; i < 4; i += 2)
          gp_stream(target + i, Bytes16{{(uint32_t)values[i], (uint32_t)(values[i] >> 32), (uint32_t)values[i + 1],
                                         (uint32_t)(values[i + 1] >> 32)}});
    else
      GP_UNROLL for (int32_t i = 0; i < 4; ++i) if (i < count) target[i] = values[i];
    return;
  }
  uint8_t *target = (uint8_t *)out + element;
  if (wide)
    gp_stream(target, Bytes4{{(uint32_t)(uint8_t)values[0] | (uint32_t)(uint8_t)values[1] << 8 |
                              (uint32_t)(uint8_t)values[2] << 16 | (uint32_t)(uint8_t)values[3] << 24}});
  else
    GP_UNROLL for (int32_t i = 0; i < 4; ++i) if (i < count) target[i] = (uint8_t)values[i];
}

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
GP_FN void augment_element(int64_t element, const uint8_t *GP_RESTRICT images, const uint8_t *GP_RESTRICT arena,
                           const int64_t *GP_RESTRICT blocks, const Plane *GP_RESTRICT label_planes,
                           const int32_t *GP_RESTRICT nearest, int32_t nearest_length,
                           const AugmentParams *GP_RESTRICT all_params, const int32_t *GP_RESTRICT crop_tables,
                           const int32_t *GP_RESTRICT linear_index, const float *GP_RESTRICT linear_weight,
                           const int32_t *GP_RESTRICT crop_nearest, int32_t crop_length,
                           const int32_t *GP_RESTRICT prompt_ids, const int32_t *GP_RESTRICT label_modes,
                           int32_t num_prompts, int32_t height, int32_t width, int32_t image_type, int32_t label_type,
                           void *GP_RESTRICT out_image, void *GP_RESTRICT out_labels) {
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

  uint32_t salt[4] = {0xffffffffu, 0xffffffffu, 0xffffffffu, 0xffffffffu};
  if (params.salt_threshold) {
    const PhiloxWords words = philox4x32((uint32_t)quad, kOperationSalt, 0, params.stream_salt, params.key0,
                                         params.key1);
    salt[0] = words.w0, salt[1] = words.w1, salt[2] = words.w2, salt[3] = words.w3;
  }
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
    float normals[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (params.noise_mode) {
      const PhiloxWords words = philox4x32((uint32_t)quad, kOperationNoise, (uint32_t)channel, params.stream_salt,
                                           params.key0, params.key1);
      const NormalPair a = gp_normal_pair(words.w0, words.w1);
      const NormalPair b = gp_normal_pair(words.w2, words.w3);
      normals[0] = a.first, normals[1] = a.second, normals[2] = b.first, normals[3] = b.second;
    }
    GP_UNROLL for (int32_t i = 0; i < 4; ++i) {
      float value = gp_add(values[channel][i], params.shift);
      if (params.noise_mode) value = add_noise(value, normals[i], params);
      if (params.salt_threshold) value = salt_or(value, salt[i], params.salt_threshold);
      values[channel][i] = value;
    }
    store_image(out_image, (sample * 3 + target) * num_pixels + first, values[channel], count, wide, image_type);
  }
  for (int32_t prompt = 0; prompt < num_prompts; ++prompt) {
    int64_t labels[4];
    GP_UNROLL for (int32_t i = 0; i < 4; ++i)
        labels[i] = label_value(ids[i], label_modes[sample], prompt_ids[sample * num_prompts + prompt]);
    store_labels(out_labels, (sample * num_prompts + prompt) * num_pixels + first, labels, count, wide, label_type);
  }
}

GP_KERNEL(augment,
          (const uint8_t *GP_RESTRICT images, const uint8_t *GP_RESTRICT arena, const int64_t *GP_RESTRICT blocks,
           const Plane *GP_RESTRICT label_planes, const int32_t *GP_RESTRICT nearest, int32_t nearest_length,
           const AugmentParams *GP_RESTRICT all_params, const int32_t *GP_RESTRICT crop_tables,
           const int32_t *GP_RESTRICT linear_index, const float *GP_RESTRICT linear_weight,
           const int32_t *GP_RESTRICT crop_nearest, int32_t crop_length, const int32_t *GP_RESTRICT prompt_ids,
           const int32_t *GP_RESTRICT label_modes, int32_t num_prompts, int32_t height, int32_t width,
           int32_t image_type, int32_t label_type, void *GP_RESTRICT out_image, void *GP_RESTRICT out_labels),
          (images, arena, blocks, label_planes, nearest, nearest_length, all_params, crop_tables, linear_index,
           linear_weight, crop_nearest, crop_length, prompt_ids, label_modes, num_prompts, height, width, image_type,
           label_type, out_image, out_labels))
