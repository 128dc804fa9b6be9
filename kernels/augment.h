// Augmentation and the last step of a sample: what its two kernels have in common (augment.cu, augment_tiles.cu).
//
// The order is the reference's: quarter turns, flip, crop and resize (bilinear for the image, nearest for the mask),
// shift, Gaussian noise, salt and pepper, then the swap of channels 1 and 2. Parameters are drawn elsewhere
// (gpuparse/sampling.py).
#ifndef GPUPARSE_AUGMENT_H
#define GPUPARSE_AUGMENT_H

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
  uint32_t key0;            // the sample's random key
  uint32_t key1;
  uint32_t random_salt;
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

// The random words that decide salt and pepper for four pixels in a row of memory.
GP_FN PhiloxWords salt_words(const AugmentParams &params, int32_t quad) {
  if (!params.salt_threshold) return {0, 0, 0, 0};
  return philox4x32((uint32_t)quad, kOperationSalt, 0, params.random_salt, params.key0, params.key1);
}

// Shift, noise, salt and pepper of four pixels of one channel in a row of memory, which share their random words.
GP_FN void change_intensity(const AugmentParams &params, int32_t quad, int32_t channel, const PhiloxWords &salt,
                            float *values) {
  GP_UNROLL for (int32_t i = 0; i < 4; ++i) values[i] = gp_add(values[i], params.shift);
  if (params.noise_mode) {
    const PhiloxWords words = philox4x32((uint32_t)quad, kOperationNoise, (uint32_t)channel, params.random_salt,
                                         params.key0, params.key1);
    const NormalPair a = gp_normal_pair(words.w0, words.w1);
    const NormalPair b = gp_normal_pair(words.w2, words.w3);
    const float normals[4] = {a.first, a.second, b.first, b.second};
    GP_UNROLL for (int32_t i = 0; i < 4; ++i) values[i] = add_noise(values[i], normals[i], params);
  }
  if (params.salt_threshold) {
    const uint32_t words[4] = {salt.w0, salt.w1, salt.w2, salt.w3};
    GP_UNROLL for (int32_t i = 0; i < 4; ++i) values[i] = salt_or(values[i], words[i], params.salt_threshold);
  }
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

// What both kernels take. Arrays of a batch: encoded images (3 planes a sample), decoded chunks with the native label
// planes in them, parameters, two crop tables a sample, prompts (num_prompts a sample); and where the results go.
#define GP_AUGMENT_PARAMETERS                                                                                         \
  const uint8_t *GP_RESTRICT images, const uint8_t *GP_RESTRICT arena, const int64_t *GP_RESTRICT blocks,             \
      const Plane *GP_RESTRICT label_planes, const int32_t *GP_RESTRICT nearest, int32_t nearest_length,              \
      const AugmentParams *GP_RESTRICT all_params, const int32_t *GP_RESTRICT crop_tables,                            \
      const int32_t *GP_RESTRICT linear_index, const float *GP_RESTRICT linear_weight,                                \
      const int32_t *GP_RESTRICT crop_nearest, int32_t crop_length, const int32_t *GP_RESTRICT prompt_ids,            \
      const int32_t *GP_RESTRICT label_modes, int32_t num_prompts, int32_t height, int32_t width, int32_t image_type, \
      int32_t label_type, void *GP_RESTRICT out_image, void *GP_RESTRICT out_labels
#define GP_AUGMENT_ARGUMENTS                                                                                          \
  images, arena, blocks, label_planes, nearest, nearest_length, all_params, crop_tables, linear_index, linear_weight, \
      crop_nearest, crop_length, prompt_ids, label_modes, num_prompts, height, width, image_type, label_type,         \
      out_image, out_labels

#endif  // GPUPARSE_AUGMENT_H
