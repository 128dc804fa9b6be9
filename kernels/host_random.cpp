// Host only: Philox for many counters, and the keyed permutation that gpuparse/plan.py describes. Drawn for each sample
// of an epoch, they are small work by the thousand: in numpy they held the interpreter for most of the time of drawing.
#include "philox.h"

extern "C" {

// Words of `num_blocks` counters (4 words each), each with a key of its own (2 words).
void gpuparse_philox(int64_t num_blocks, const uint32_t *counters, const uint32_t *keys, uint32_t *out) {
  for (int64_t i = 0; i < num_blocks; ++i, counters += 4, keys += 2, out += 4) {
    const PhiloxWords words = philox4x32(counters[0], counters[1], counters[2], counters[3], keys[0], keys[1]);
    out[0] = words.w0, out[1] = words.w1, out[2] = words.w2, out[3] = words.w3;
  }
}

// Images of `num_values` numbers, each below its length, under six Feistel rounds over the next power of four, walked
// until the image is inside. Lengths are below 2^63, streams below 2^28; `operation` is the fourth counter word.
void gpuparse_permute(int64_t num_values, const uint64_t *lengths, const uint32_t *epochs, const uint32_t *streams,
                      uint32_t operation, uint32_t key0, uint32_t key1, uint64_t *values) {
  for (int64_t i = 0; i < num_values; ++i) {
    const uint64_t length = lengths[i];
    if (length <= 1) continue;
    int32_t half = 1;
    while (2 * half < 64 && (length - 1) >> 2 * half) ++half;
    const uint64_t mask = (uint64_t{1} << half) - 1;
    uint64_t value = values[i];
    do {
      uint64_t left = value >> half, right = value & mask;
      for (uint32_t round = 0; round < 6; ++round) {
        const uint32_t word = philox4x32((uint32_t)right, 8 * streams[i] + round, epochs[i], operation, key0, key1).w0;
        const uint64_t next = (left ^ word) & mask;
        left = right;
        right = next;
      }
      value = left << half | right;
    } while (value >= length);
    values[i] = value;
  }
}

// For tests: the kernels' normals.
void gpuparse_normals(int64_t num_pairs, const uint32_t *words, float *out) {
  for (int64_t i = 0; i < num_pairs; ++i) {
    const NormalPair pair = gp_normal_pair(words[2 * i], words[2 * i + 1]);
    out[2 * i] = pair.first, out[2 * i + 1] = pair.second;
  }
}

}  // extern "C"
