// The CPU's driver of augment.cu: the same arithmetic, ordered by rows so that its loops become vectors.
//
// Two passes over a batch. The first turns and flips what needs it and encodes the mask; the second makes bands of
// output rows. Both are split over threads by independent pieces, so the thread count changes no bit.
#include <memory>
#include <vector>

#include "aligned.h"
#include "augment.cu"
#include "parallel.h"
#include "philox_row.h"
#include "stream.h"

namespace {

constexpr int32_t kBandRows = 64;
constexpr int32_t kTile = 32;

// out = the turned and flipped image; tiles keep both sides of a transposition in the cache.
template <typename Pixel>
void apply_symmetry(const Pixel *GP_RESTRICT image, int32_t rotate, int32_t flip, int32_t height, int32_t width,
                    Pixel *GP_RESTRICT out) {
  if (!(rotate & 1)) {
    for (int32_t y = 0; y < height; ++y) {
      const Position first = symmetry_source(rotate, flip, height, width, y, 0);
      const Pixel *row = image + (int64_t)first.y * width;
      Pixel *target = out + (int64_t)y * width;
      if (first.x == 0)
        memcpy(target, row, sizeof(Pixel) * width);
      else
        for (int32_t x = 0; x < width; ++x) target[x] = row[width - 1 - x];
    }
    return;
  }
  for (int32_t tile_y = 0; tile_y < height; tile_y += kTile)
    for (int32_t tile_x = 0; tile_x < width; tile_x += kTile)
      for (int32_t y = tile_y; y < gp_min(tile_y + kTile, height); ++y) {
        const Position start = symmetry_source(rotate, flip, height, width, y, tile_x);
        const Position next = symmetry_source(rotate, flip, height, width, y, tile_x + 1);
        const int64_t step = (int64_t)(next.y - start.y) * width;
        const Pixel *source = image + (int64_t)start.y * width + start.x;
        for (int32_t x = tile_x; x < gp_min(tile_x + kTile, width); ++x, source += step)
          out[(int64_t)y * width + x] = *source;
      }
}

struct Batch {
  const uint8_t *images;
  const uint8_t *arena;
  const int64_t *blocks;
  const Plane *label_planes;
  const int32_t *nearest;
  int32_t nearest_length;
  const AugmentParams *params;
  const int32_t *crop_tables;
  CropTables tables;
  const int32_t *prompt_ids;
  const int32_t *label_modes;
  int32_t num_prompts, height, width, image_type, label_type;
  void *out_image, *out_labels;

  int64_t num_pixels() const { return (int64_t)height * width; }
};

// What the first pass leaves for the second; not filled with zeros first, as vectors would be.
struct Prepared {
  std::unique_ptr<uint8_t[]> turned;  // three channels, null where the encoded image serves as it is
  std::unique_ptr<uint8_t[]> mask;    // ids as uint8 where the store has bytes, else as uint32
};

template <typename Id>
void prepare_mask(const Batch &batch, int64_t sample, Id *GP_RESTRICT mask) {
  const AugmentParams &params = batch.params[sample];
  const Plane plane = batch.label_planes[sample];
  const int32_t *rows = batch.nearest + (int64_t)plane.row_table * batch.nearest_length;
  const int32_t *columns = batch.nearest + (int64_t)plane.column_table * batch.nearest_length;
  if (params.zero) {
    memset(mask, 0, sizeof(Id) * batch.num_pixels());
    return;
  }
  const Id keep = params.wrap_ids ? (Id)255 : (Id)0xffffffffu;
  AlignedVector<Id> native(plane.padded_width);
  std::unique_ptr<Id[]> encoded(params.rotate || params.flip ? new Id[batch.num_pixels()] : nullptr);
  Id *out = encoded ? encoded.get() : mask;
  int32_t previous = -1;
  for (int32_t y = 0; y < batch.height; ++y) {
    Id *row = out + (int64_t)y * batch.width;
    if (rows[y] == previous) {
      memcpy(row, row - batch.width, sizeof(Id) * batch.width);
      continue;
    }
    previous = rows[y];
    const int32_t native_y = rows[y] - plane.pad_top;
    if (native_y < 0 || native_y >= plane.height) {
      memset(row, 0, sizeof(Id) * batch.width);
      continue;
    }
    for (int32_t x = 0; x < plane.width; ++x) {
      // Block by block, so that the block's address is worked out once per block.
      const int32_t stop = gp_min((x / plane.block_width + 1) * plane.block_width, plane.width);
      const int32_t block_y = native_y / plane.block_height;
      const int64_t offset =
          batch.blocks[plane.first_block + (int64_t)block_y * plane.blocks_per_row + x / plane.block_width];
      const uint8_t *source = batch.arena + offset + (int64_t)(native_y % plane.block_height) * plane.row_stride;
      Id *target = native.data() + plane.pad_left + x;
      const int32_t count = stop - x;
      if (offset < 0)
        memset(target, 0, sizeof(Id) * count);
      else if (sizeof(Id) == 1)
        for (int32_t i = 0; i < count; ++i) target[i] = source[i * plane.column_stride];
      else
        for (int32_t i = 0; i < count; ++i)
          target[i] = (Id)load_unsigned(source + i * plane.column_stride, plane.itemsize);
      x = stop - 1;
    }
    for (int32_t x = 0; x < batch.width; ++x) row[x] = native[columns[x]] & keep;
  }
  if (encoded) apply_symmetry(encoded.get(), params.rotate, params.flip, batch.height, batch.width, mask);
}

void prepare(const Batch &batch, int64_t piece, std::vector<Prepared> &prepared) {
  const int64_t sample = piece / 4;
  const AugmentParams &params = batch.params[sample];
  const int64_t part = piece % 4;
  Prepared &mine = prepared[sample];
  if (part == 3 && batch.label_planes[sample].itemsize == 1)
    prepare_mask(batch, sample, mine.mask.get());
  else if (part == 3)
    prepare_mask(batch, sample, (uint32_t *)mine.mask.get());
  else if (mine.turned)
    apply_symmetry(batch.images + (sample * 3 + part) * batch.num_pixels(), params.rotate, params.flip, batch.height,
                   batch.width, mine.turned.get() + part * batch.num_pixels());
}

// Rows of one channel's crop, resized horizontally: consecutive rows of the output mostly ask for the same two.
struct ResizedRows {
  explicit ResizedRows(int32_t width) : upper(width), lower(width) {}
  int32_t upper_row = -1, lower_row = -1;
  AlignedVector<float> upper, lower;
};

// Row buffers of one piece of work.
struct Scratch {
  explicit Scratch(int32_t width)
      : region(width + 1),
        value(width),
        normals(width + 8),
        words(width + 8),
        salt(width + 8),
        labels(width),
        channels{ResizedRows(width), ResizedRows(width), ResizedRows(width)} {}
  AlignedVector<float> region, value, normals;
  AlignedVector<uint32_t> words, salt;
  AlignedVector<int64_t> labels;
  ResizedRows channels[3];
};

// One row of the crop, resized horizontally.
void lerp_columns(const uint8_t *GP_RESTRICT channel, const AugmentParams &params, const int32_t *GP_RESTRICT index,
                  const float *GP_RESTRICT weight, int32_t region_row, int32_t height, int32_t width,
                  AlignedVector<float> &region_buffer, float *GP_RESTRICT out) {
  const int32_t y = params.crop_top + region_row;
  if (y < 0 || y >= height) {
    memset(out, 0, sizeof(float) * width);
    return;
  }
  if ((int64_t)region_buffer.size() < params.crop_width + 1) region_buffer.resize(params.crop_width + 1);
  float *GP_RESTRICT region = region_buffer.data();
  const int32_t start = gp_min(gp_max(0, -params.crop_left), params.crop_width);
  const int32_t stop = gp_max(gp_min(width - params.crop_left, params.crop_width), start);
  const uint8_t *GP_RESTRICT row = channel + (int64_t)y * width + params.crop_left;
  for (int32_t x = 0; x < start; ++x) region[x] = 0.0f;
  for (int32_t x = start; x < stop; ++x) region[x] = (float)row[x];
  for (int32_t x = stop; x < params.crop_width; ++x) region[x] = 0.0f;
  region[params.crop_width] = region[params.crop_width - 1];
  for (int32_t x = 0; x < width; ++x) out[x] = lerp(region[index[x]], region[index[x] + 1], weight[x]);
}

void geometry_row(const Batch &batch, int64_t sample, const uint8_t *channel, int32_t y, ResizedRows &resized,
                  Scratch &scratch) {
  const AugmentParams &params = batch.params[sample];
  float *GP_RESTRICT value = scratch.value.data();
  if (params.zero) {
    memset(value, 0, sizeof(float) * batch.width);
    return;
  }
  if (!params.crop) {
    const uint8_t *row = channel + (int64_t)y * batch.width;
    for (int32_t x = 0; x < batch.width; ++x) value[x] = (float)row[x];
    return;
  }
  const int64_t row_entry = (int64_t)batch.crop_tables[2 * sample] * batch.tables.length + y;
  const int64_t columns = (int64_t)batch.crop_tables[2 * sample + 1] * batch.tables.length;
  const int32_t upper_row = batch.tables.linear_index[row_entry];
  const int32_t lower_row = gp_min(upper_row + 1, params.crop_height - 1);
  const auto resize = [&](int32_t region_row, AlignedVector<float> &out) {
    lerp_columns(channel, params, batch.tables.linear_index + columns, batch.tables.linear_weight + columns, region_row,
                 batch.height, batch.width, scratch.region, out.data());
  };
  if (resized.upper_row != upper_row) {
    if (resized.lower_row == upper_row)
      resized.upper.swap(resized.lower), resized.lower_row = -1;
    else
      resize(upper_row, resized.upper);
    resized.upper_row = upper_row;
  }
  if (resized.lower_row != lower_row) resize(resized.lower_row = lower_row, resized.lower);
  const float row_weight = batch.tables.linear_weight[row_entry];
  const float *GP_RESTRICT upper = resized.upper.data();
  const float *GP_RESTRICT lower = resized.lower.data();
  for (int32_t x = 0; x < batch.width; ++x) value[x] = lerp(upper[x], lower[x], row_weight);
  if (params.crop_round)
    for (int32_t x = 0; x < batch.width; ++x) value[x] = gp_round_even(value[x]);
}

// Random blocks lie over the flat pixels in fours; a row may begin inside one. `first_quad` is the row's first block.
void noise_row(const AugmentParams &params, int32_t channel, uint32_t first_quad, int32_t num_quads, int32_t skip,
               int32_t width, Scratch &scratch) {
  philox_row({first_quad, kOperationNoise, (uint32_t)channel, params.random_salt}, params.key0, params.key1, num_quads,
             scratch.words.data());
  const uint32_t *GP_RESTRICT words = scratch.words.data();
  float *GP_RESTRICT normals = scratch.normals.data();
  for (int32_t i = 0; i < 2 * num_quads; ++i) {
    const NormalPair pair = gp_normal_pair(words[2 * i], words[2 * i + 1]);
    normals[2 * i] = pair.first, normals[2 * i + 1] = pair.second;
  }
  float *GP_RESTRICT value = scratch.value.data();
  if (params.noise_mode == kNoiseGaussian)
    for (int32_t x = 0; x < width; ++x) value[x] = gp_add(value[x], gp_mul(normals[skip + x], params.noise_std));
  else
    for (int32_t x = 0; x < width; ++x) value[x] = add_noise(value[x], normals[skip + x], params);
}

void store_image_row(const Batch &batch, int64_t element, Scratch &scratch) {
  const float *GP_RESTRICT value = scratch.value.data();
  if (batch.image_type == kImageFloat32) {
    stream_row((float *)batch.out_image + element, value, sizeof(float) * batch.width);
    return;
  }
  uint16_t *GP_RESTRICT out = (uint16_t *)batch.out_image + element;
  if (batch.image_type == kImageFloat16)
    for (int32_t x = 0; x < batch.width; ++x) out[x] = float_to_half(value[x]);
  else
    for (int32_t x = 0; x < batch.width; ++x) out[x] = float_to_bfloat16(value[x]);
}

template <typename Id, typename Label>
void label_row(const Id *GP_RESTRICT ids, int32_t mode, int32_t prompt_id, int32_t width, Label *GP_RESTRICT out) {
  if (mode == kLabelsPerPrompt)
    for (int32_t x = 0; x < width; ++x) out[x] = (Label)(ids[x] == (uint32_t)prompt_id);
  else if (mode == kLabelsForeground)
    for (int32_t x = 0; x < width; ++x) out[x] = (Label)(ids[x] ? prompt_id : 0);
  else
    for (int32_t x = 0; x < width; ++x) out[x] = (Label)ids[x];
}

template <typename Id>
void labels_of_row(const Batch &batch, int64_t sample, const Id *mask, int32_t y, Scratch &scratch, Id *cropped) {
  const AugmentParams &params = batch.params[sample];
  const Id *ids = mask + (int64_t)y * batch.width;
  if (params.crop && !params.zero) {
    const int32_t *rows = batch.tables.nearest + (int64_t)batch.crop_tables[2 * sample] * batch.tables.length;
    const int32_t *columns = batch.tables.nearest + (int64_t)batch.crop_tables[2 * sample + 1] * batch.tables.length;
    const int32_t source_y = params.crop_top + rows[y];
    const bool inside = source_y >= 0 && source_y < batch.height;
    const Id *row = mask + (int64_t)(inside ? source_y : 0) * batch.width;
    for (int32_t x = 0; x < batch.width; ++x) {
      const int32_t source_x = params.crop_left + columns[x];
      cropped[x] = inside && source_x >= 0 && source_x < batch.width ? row[source_x] : 0;
    }
    ids = cropped;
  }
  for (int32_t prompt = 0; prompt < batch.num_prompts; ++prompt) {
    const int64_t element = ((sample * batch.num_prompts + prompt) * batch.height + y) * batch.width;
    const int32_t prompt_id = batch.prompt_ids[sample * batch.num_prompts + prompt];
    if (batch.label_type == kLabelsInt64) {
      label_row(ids, batch.label_modes[sample], prompt_id, batch.width, scratch.labels.data());
      stream_row((int64_t *)batch.out_labels + element, scratch.labels.data(), sizeof(int64_t) * batch.width);
    } else {
      label_row(ids, batch.label_modes[sample], prompt_id, batch.width, (uint8_t *)batch.out_labels + element);
    }
  }
}

template <typename Id>
void finish_band(const Batch &batch, int64_t sample, int32_t first_row, const uint8_t *images, const Id *mask) {
  const AugmentParams &params = batch.params[sample];
  Scratch scratch(batch.width);
  AlignedVector<Id> cropped(batch.width);
  for (int32_t y = first_row; y < gp_min(first_row + kBandRows, batch.height); ++y) {
    const int64_t row_start = (int64_t)y * batch.width;
    const uint32_t first_quad = (uint32_t)(row_start / 4);
    const int32_t skip = (int32_t)(row_start % 4);
    const int32_t num_quads = (skip + batch.width + 3) / 4;
    if (params.salt_threshold)
      philox_row({first_quad, kOperationSalt, 0, params.random_salt}, params.key0, params.key1, num_quads,
                 scratch.salt.data());
    for (int32_t channel = 0; channel < 3; ++channel) {
      geometry_row(batch, sample, images + channel * batch.num_pixels(), y, scratch.channels[channel], scratch);
      float *value = scratch.value.data();
      for (int32_t x = 0; x < batch.width; ++x) value[x] = gp_add(value[x], params.shift);
      if (params.noise_mode) noise_row(params, channel, first_quad, num_quads, skip, batch.width, scratch);
      if (params.salt_threshold)
        for (int32_t x = 0; x < batch.width; ++x)
          value[x] = salt_or(value[x], scratch.salt[skip + x], params.salt_threshold);
      const int32_t target = params.swap && channel ? 3 - channel : channel;
      store_image_row(batch, (sample * 3 + target) * batch.num_pixels() + row_start, scratch);
    }
    labels_of_row(batch, sample, mask, y, scratch, cropped.data());
  }
  stream_fence();
}

}  // namespace

extern "C" void gpuparse_augment(int64_t num_samples, int32_t num_threads, const uint8_t *images, const uint8_t *arena,
                                 const int64_t *blocks, const Plane *label_planes, const int32_t *nearest,
                                 int32_t nearest_length, const AugmentParams *params, const int32_t *crop_tables,
                                 const int32_t *linear_index, const float *linear_weight, const int32_t *crop_nearest,
                                 int32_t crop_length, const int32_t *prompt_ids, const int32_t *label_modes,
                                 int32_t num_prompts, int32_t height, int32_t width, int32_t image_type,
                                 int32_t label_type, void *out_image, void *out_labels) {
  const Batch batch = {images,       arena,       blocks,
                       label_planes, nearest,     nearest_length,
                       params,       crop_tables, {linear_index, linear_weight, crop_nearest, crop_length},
                       prompt_ids,   label_modes, num_prompts,
                       height,       width,       image_type,
                       label_type,   out_image,   out_labels};
  std::vector<Prepared> prepared(num_samples);
  for (int64_t sample = 0; sample < num_samples; ++sample) {
    const int64_t id_bytes = label_planes[sample].itemsize == 1 ? 1 : sizeof(uint32_t);
    prepared[sample].mask.reset(new uint8_t[batch.num_pixels() * id_bytes]);
    if ((params[sample].rotate || params[sample].flip) && !params[sample].zero)
      prepared[sample].turned.reset(new uint8_t[3 * batch.num_pixels()]);
  }
  parallel_for(num_samples * 4, num_threads, [&](int64_t piece) { prepare(batch, piece, prepared); });
  const int64_t num_bands = (height + kBandRows - 1) / kBandRows;
  parallel_for(num_samples * num_bands, num_threads, [&](int64_t piece) {
    const int64_t sample = piece / num_bands;
    const int32_t first_row = (int32_t)(piece % num_bands) * kBandRows;
    const Prepared &mine = prepared[sample];
    const uint8_t *turned = mine.turned ? mine.turned.get() : images + sample * 3 * batch.num_pixels();
    if (label_planes[sample].itemsize == 1)
      finish_band(batch, sample, first_row, turned, mine.mask.get());
    else
      finish_band(batch, sample, first_row, turned, (const uint32_t *)mine.mask.get());
  });
}
