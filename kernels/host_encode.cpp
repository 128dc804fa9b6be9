// The CPU's driver of encode.cu: the same arithmetic, ordered by rows so that each source row is resampled once.
#include <vector>

#include "encode.cu"
#include "parallel.h"

namespace {

constexpr int32_t kMargin = 2;  // replicated pixels left and right, so that taps never need a clamp

// One padded row as bytes. Returns false (and writes nothing) where the row is padding.
bool gather_row(const uint8_t *arena, const int64_t *blocks, const Plane &plane, int32_t padded_y, uint8_t *row) {
  const int32_t y = padded_y - plane.pad_top;
  if (y < 0 || y >= plane.height) return false;
  const int32_t block_y = y / plane.block_height;
  const int64_t *block = blocks + plane.first_block + (int64_t)block_y * plane.blocks_per_row;
  const int64_t row_offset = (int64_t)(y - block_y * plane.block_height) * plane.row_stride;
  uint8_t *out = row + plane.pad_left;
  memset(row, 0, plane.pad_left);
  for (int32_t x = 0; x < plane.width; x += plane.block_width, ++block) {
    const int32_t count = gp_min(plane.block_width, plane.width - x);
    if (*block < 0) {
      memset(out + x, 0, count);
    } else if (plane.column_stride == 1) {
      memcpy(out + x, arena + *block + row_offset, count);
    } else {
      const uint8_t *source = arena + *block + row_offset;
      for (int32_t i = 0; i < count; ++i) out[x + i] = source[i * plane.column_stride];
    }
  }
  const int32_t end = plane.pad_left + plane.width;
  memset(row + end, 0, plane.padded_width - end);
  return true;
}

// Two passes, because compilers fill vectors from scattered addresses badly: collect each output's four taps as one
// 32-bit word, then do the arithmetic on whole vectors of words.
void resample_row(const uint8_t *GP_RESTRICT row, const int32_t *GP_RESTRICT index, const float *GP_RESTRICT weights,
                  int32_t table_length, int32_t out_width, uint32_t *GP_RESTRICT taps, float *GP_RESTRICT out) {
  const float *GP_RESTRICT w0 = weights;
  const float *GP_RESTRICT w1 = weights + table_length;
  const float *GP_RESTRICT w2 = weights + 2 * (int64_t)table_length;
  const float *GP_RESTRICT w3 = weights + 3 * (int64_t)table_length;
  for (int32_t x = 0; x < out_width; ++x) memcpy(taps + x, row + index[x], 4);
  for (int32_t x = 0; x < out_width; ++x) {
    const uint32_t four = taps[x];  // little-endian: the leftmost tap in the lowest byte
    out[x] = cubic_horizontal((float)(int32_t)(four & 255), (float)(int32_t)(four >> 8 & 255),
                              (float)(int32_t)(four >> 16 & 255), (float)(int32_t)(four >> 24), w0[x], w1[x], w2[x],
                              w3[x]);
  }
}

void blend_rows(const float *GP_RESTRICT r0, const float *GP_RESTRICT r1, const float *GP_RESTRICT r2,
                const float *GP_RESTRICT r3, float b0, float b1, float b2, float b3, int32_t out_width,
                uint8_t *GP_RESTRICT out) {
  for (int32_t x = 0; x < out_width; ++x)
    out[x] = saturate_uint8(cubic_vertical(r0[x], r1[x], r2[x], r3[x], b0, b1, b2, b3));
}

struct Tables {
  const int32_t *index;
  const float *weights;
  int32_t length;
};

void encode_plane(const uint8_t *arena, const int64_t *blocks, const Plane &plane, const Tables &tables,
                  int32_t out_height, int32_t out_width, uint8_t *out) {
  if (plane.padded_height == out_height && plane.padded_width == out_width) {
    const bool whole = plane.height == out_height && plane.width == out_width && plane.block_height >= out_height &&
                       plane.block_width >= out_width && plane.row_stride == out_width && plane.column_stride == 1;
    if (whole && blocks[plane.first_block] >= 0) {  // one slice, one chunk: nothing to gather
      memcpy(out, arena + blocks[plane.first_block], (int64_t)out_height * out_width);
      return;
    }
    for (int32_t y = 0; y < out_height; ++y) {
      uint8_t *row = out + (int64_t)y * out_width;
      if (!gather_row(arena, blocks, plane, y, row)) memset(row, 0, out_width);
    }
    return;
  }
  const int32_t *column_index = tables.index + (int64_t)plane.column_table * tables.length;
  const float *column_weights = tables.weights + (int64_t)plane.column_table * 4 * tables.length;
  const int32_t *row_index = tables.index + (int64_t)plane.row_table * tables.length;
  const float *row_weights = tables.weights + (int64_t)plane.row_table * 4 * tables.length;

  // The buffer starts kMargin left of the image and a tap group starts at index - 1: one constant shift.
  std::vector<uint8_t> bytes(plane.padded_width + 2 * kMargin + 4);
  std::vector<float> ring(4 * (int64_t)out_width);
  std::vector<uint32_t> taps(out_width);
  int32_t ring_row[4] = {-1, -1, -1, -1};  // which padded row each slot of the ring holds
  uint8_t *image = bytes.data() + kMargin;

  const auto resampled = [&](int32_t y) -> const float * {
    const int32_t slot = y & 3;
    float *target = ring.data() + (int64_t)slot * out_width;
    if (ring_row[slot] == y) return target;
    ring_row[slot] = y;
    if (!gather_row(arena, blocks, plane, y, image)) {
      memset(target, 0, sizeof(float) * out_width);
      return target;
    }
    memset(bytes.data(), image[0], kMargin);
    memset(image + plane.padded_width, image[plane.padded_width - 1], kMargin);
    resample_row(image - 1, column_index, column_weights, tables.length, out_width, taps.data(), target);
    return target;
  };

  for (int32_t out_y = 0; out_y < out_height; ++out_y) {
    const float *rows[4];
    for (int32_t j = 0; j < 4; ++j) rows[j] = resampled(gp_nearest(row_index[out_y] - 1 + j, plane.padded_height));
    blend_rows(rows[0], rows[1], rows[2], rows[3], row_weights[out_y], row_weights[tables.length + out_y],
               row_weights[2 * (int64_t)tables.length + out_y], row_weights[3 * (int64_t)tables.length + out_y],
               out_width, out + (int64_t)out_y * out_width);
  }
}

}  // namespace

extern "C" void gpuparse_encode(int64_t num_planes, int32_t num_threads, const uint8_t *arena, const int64_t *blocks,
                                const Plane *planes, const int32_t *table_index, const float *table_weights,
                                int32_t table_length, int32_t out_height, int32_t out_width, uint8_t *out) {
  const Tables tables{table_index, table_weights, table_length};
  const int64_t plane_size = (int64_t)out_height * out_width;
  parallel_for(num_planes, num_threads, [&](int64_t i) {
    encode_plane(arena, blocks, planes[i], tables, out_height, out_width, out + i * plane_size);
  });
}

extern "C" void gpuparse_encode_mask(int64_t num_planes, int32_t num_threads, const uint8_t *arena,
                                     const int64_t *blocks, const Plane *planes, const int32_t *nearest_index,
                                     int32_t table_length, int32_t out_height, int32_t out_width, uint32_t *out) {
  parallel_for(num_planes * out_height, num_threads, [&](int64_t row) {
    for (int64_t element = row * out_width; element < (row + 1) * out_width; ++element)
      encode_mask_element(element, arena, blocks, planes, nearest_index, table_length, out_height, out_width, out);
  });
}
