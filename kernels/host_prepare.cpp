// The CPU's driver of prepare.cu: the same arithmetic, ordered by rows so that each source row is resampled once.
// host.cpp includes host_encode.cpp first, whose gather_row reads a padded row.
#include <vector>

#include "parallel.h"
#include "prepare.cu"

namespace {

struct FixedTables {
  const int32_t *first;
  const int32_t *weights;
  const int32_t *bits;
  int32_t length;
};

// Two passes, as in host_encode.cpp: collect each output's four taps as one word, then whole vectors of arithmetic.
void resample_fixed_row(const uint8_t *GP_RESTRICT row, const FixedTables &tables, int32_t table, int32_t out_width,
                        uint32_t *GP_RESTRICT taps, uint8_t *GP_RESTRICT out) {
  const int32_t *GP_RESTRICT first = tables.first + (int64_t)table * tables.length;
  const int32_t *GP_RESTRICT w0 = tables.weights + (int64_t)table * 4 * tables.length;
  const int32_t *GP_RESTRICT w1 = w0 + tables.length;
  const int32_t *GP_RESTRICT w2 = w1 + tables.length;
  const int32_t *GP_RESTRICT w3 = w2 + tables.length;
  const int32_t bits = tables.bits[table];
  for (int32_t x = 0; x < out_width; ++x) memcpy(taps + x, row + first[x], 4);
  for (int32_t x = 0; x < out_width; ++x) {
    const uint32_t four = taps[x];  // little-endian: the leftmost tap in the lowest byte
    out[x] = round_fixed(fixed_sum((int32_t)(four & 255), (int32_t)(four >> 8 & 255), (int32_t)(four >> 16 & 255),
                                   (int32_t)(four >> 24), w0[x], w1[x], w2[x], w3[x], bits),
                         bits);
  }
}

void blend_fixed_rows(const uint8_t *const rows[4], const int32_t weights[4], int32_t bits, int32_t out_width,
                      uint8_t *GP_RESTRICT out) {
  const uint8_t *GP_RESTRICT r0 = rows[0];
  const uint8_t *GP_RESTRICT r1 = rows[1];
  const uint8_t *GP_RESTRICT r2 = rows[2];
  const uint8_t *GP_RESTRICT r3 = rows[3];
  const int32_t w0 = weights[0], w1 = weights[1], w2 = weights[2], w3 = weights[3];
  for (int32_t x = 0; x < out_width; ++x)
    out[x] = round_fixed(fixed_sum(r0[x], r1[x], r2[x], r3[x], w0, w1, w2, w3, bits), bits);
}

void prepare_plane(const uint8_t *arena, const int64_t *blocks, const Plane &plane, const FixedTables &tables,
                   int32_t out_height, int32_t out_width, uint8_t *out) {
  if (plane.padded_height == out_height && plane.padded_width == out_width) {
    for (int32_t y = 0; y < out_height; ++y) {
      uint8_t *row = out + (int64_t)y * out_width;
      if (!gather_row(arena, blocks, plane, y, row)) memset(row, 0, out_width);
    }
    return;
  }
  const int32_t *row_first = tables.first + (int64_t)plane.row_table * tables.length;
  const int32_t *row_weights = tables.weights + (int64_t)plane.row_table * 4 * tables.length;
  std::vector<uint8_t> source(plane.padded_width + 4);  // four taps are read where fewer may count
  std::vector<uint8_t> ring(4 * (int64_t)out_width);
  std::vector<uint32_t> taps(out_width);
  int32_t ring_row[4] = {-1, -1, -1, -1};  // which padded row each slot of the ring holds

  const auto resampled = [&](int32_t y) -> const uint8_t * {
    const int32_t slot = y & 3;
    uint8_t *target = ring.data() + (int64_t)slot * out_width;
    if (ring_row[slot] == y) return target;
    ring_row[slot] = y;
    if (gather_row(arena, blocks, plane, y, source.data()))
      resample_fixed_row(source.data(), tables, plane.column_table, out_width, taps.data(), target);
    else
      memset(target, 0, out_width);
    return target;
  };

  for (int32_t out_y = 0; out_y < out_height; ++out_y) {
    const uint8_t *rows[4];
    int32_t weights[4];
    for (int32_t j = 0; j < 4; ++j) {
      rows[j] = resampled(gp_min(row_first[out_y] + j, plane.padded_height - 1));
      weights[j] = row_weights[(int64_t)j * tables.length + out_y];
    }
    blend_fixed_rows(rows, weights, tables.bits[plane.row_table], out_width, out + (int64_t)out_y * out_width);
  }
}

}  // namespace

extern "C" void gpuparse_prepare(int64_t num_planes, int32_t num_threads, const uint8_t *arena, const int64_t *blocks,
                                 const Plane *planes, const int32_t *table_first, const int32_t *table_weights,
                                 const int32_t *table_bits, int32_t table_length, int32_t out_height, int32_t out_width,
                                 uint8_t *out) {
  const FixedTables tables{table_first, table_weights, table_bits, table_length};
  const int64_t plane_size = (int64_t)out_height * out_width;
  parallel_for(num_planes, num_threads, [&](int64_t i) {
    prepare_plane(arena, blocks, planes[i], tables, out_height, out_width, out + i * plane_size);
  });
}
