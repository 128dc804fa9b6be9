// Host only: Philox for many counters, and the keyed permutation that gpuparse/plan.py describes. Drawn for each sample
// of an epoch, they are small work by the thousand: in numpy they held the interpreter for most of the time of drawing.
#include "philox.h"

namespace {

constexpr uint32_t kShuffled = 64;

// Puts 0 .. length - 1 into `order`, each permutation as likely as another but for a bias below 2^-25.
void shuffle(uint8_t *order, uint32_t length, uint32_t word1, uint32_t epoch, uint32_t operation, uint32_t key0,
             uint32_t key1) {
  PhiloxWords words{};
  for (uint32_t i = 0; i < length; ++i) {
    if (i % 4 == 0) words = philox4x32(i / 4, word1, epoch, operation, key0, key1);
    const uint32_t word = i % 4 == 0 ? words.w0 : i % 4 == 1 ? words.w1 : i % 4 == 2 ? words.w2 : words.w3;
    const uint32_t place = (uint32_t)((uint64_t)word * (i + 1) >> 32);
    order[i] = order[place];
    order[place] = (uint8_t)i;
  }
}

}  // namespace

extern "C" {

// Words of `num_blocks` counters (4 words each), each with a key of its own (2 words).
void gpuparse_philox(int64_t num_blocks, const uint32_t *counters, const uint32_t *keys, uint32_t *out) {
  for (int64_t i = 0; i < num_blocks; ++i, counters += 4, keys += 2, out += 4) {
    const PhiloxWords words = philox4x32(counters[0], counters[1], counters[2], counters[3], keys[0], keys[1]);
    out[0] = words.w0, out[1] = words.w1, out[2] = words.w2, out[3] = words.w3;
  }
}

// Images of `num_values` numbers, each below its length. Up to `kShuffled` the whole order is shuffled by Fisher and
// Yates, since a Feistel network over so few bits is visibly uneven. Above, six Feistel rounds over the next power of
// four, walked until the image is inside. Lengths are below 2^63, purposes below 2^28; `operation` is the fourth
// counter word.
void gpuparse_permute(int64_t num_values, const uint64_t *lengths, const uint32_t *epochs, const uint32_t *purposes,
                      uint32_t operation, uint32_t key0, uint32_t key1, uint64_t *values) {
  uint8_t order[kShuffled] = {};
  int64_t shuffled = -1;  // for which of the values `order` was made
  for (int64_t i = 0; i < num_values; ++i) {
    const uint64_t length = lengths[i];
    if (length <= kShuffled) {
      if (shuffled < 0 || lengths[shuffled] != length || epochs[shuffled] != epochs[i] ||
          purposes[shuffled] != purposes[i]) {
        shuffle(order, (uint32_t)length, 8 * purposes[i] + 6, epochs[i], operation, key0, key1);
        shuffled = i;
      }
      values[i] = order[values[i]];
      continue;
    }
    int32_t half = 1;
    while (2 * half < 64 && (length - 1) >> 2 * half) ++half;
    const uint64_t mask = (uint64_t{1} << half) - 1;
    uint64_t value = values[i];
    do {
      uint64_t left = value >> half, right = value & mask;
      for (uint32_t round = 0; round < 6; ++round) {
        const uint32_t word = philox4x32((uint32_t)right, 8 * purposes[i] + round, epochs[i], operation, key0, key1).w0;
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
