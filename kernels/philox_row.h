// Host only: Philox over consecutive counters. Compilers do not turn its widening products into vectors by themselves.
#ifndef GPUPARSE_PHILOX_ROW_H
#define GPUPARSE_PHILOX_ROW_H

#include "philox.h"
#ifdef __AVX2__
#include <immintrin.h>
#endif

struct PhiloxCounter {
  uint32_t c0, c1, c2, c3;
};

#ifdef __AVX2__
// Four blocks at once, a word in the lower half of each 64-bit lane; what the upper halves hold does not matter.
static inline void philox_four(const PhiloxCounter &first, uint32_t key0, uint32_t key1, uint32_t *out) {
  __m256i c0 = _mm256_add_epi32(_mm256_set1_epi32((int)first.c0), _mm256_setr_epi32(0, 0, 1, 0, 2, 0, 3, 0));
  __m256i c1 = _mm256_set1_epi32((int)first.c1);
  __m256i c2 = _mm256_set1_epi32((int)first.c2);
  __m256i c3 = _mm256_set1_epi32((int)first.c3);
  const __m256i left_factor = _mm256_set1_epi32((int)0xD2511F53u);
  const __m256i right_factor = _mm256_set1_epi32((int)0xCD9E8D57u);
  for (int32_t round = 0; round < 10; ++round) {
    const __m256i left = _mm256_mul_epu32(c0, left_factor);
    const __m256i right = _mm256_mul_epu32(c2, right_factor);
    c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(right, 32), c1), _mm256_set1_epi32((int)key0));
    c1 = right;
    c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(left, 32), c3), _mm256_set1_epi32((int)key1));
    c3 = left;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  const __m256i first_two = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xaa);
  const __m256i last_two = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xaa);
  const __m256i even = _mm256_unpacklo_epi64(first_two, last_two);  // blocks 0 and 2
  const __m256i odd = _mm256_unpackhi_epi64(first_two, last_two);   // blocks 1 and 3
  _mm256_storeu_si256((__m256i *)out, _mm256_permute2x128_si256(even, odd, 0x20));
  _mm256_storeu_si256((__m256i *)(out + 8), _mm256_permute2x128_si256(even, odd, 0x31));
}
#endif

// The words of `num_blocks` blocks whose first counter word goes up by one.
static inline void philox_row(PhiloxCounter counter, uint32_t key0, uint32_t key1, int32_t num_blocks, uint32_t *out) {
  int32_t done = 0;
#ifdef __AVX2__
  for (; done + 4 <= num_blocks; done += 4, counter.c0 += 4) philox_four(counter, key0, key1, out + 4 * done);
#endif
  for (; done < num_blocks; ++done, ++counter.c0) {
    const PhiloxWords words = philox4x32(counter.c0, counter.c1, counter.c2, counter.c3, key0, key1);
    const uint32_t values[4] = {words.w0, words.w1, words.w2, words.w3};
    memcpy(out + 4 * done, values, sizeof(values));
  }
}

#endif  // GPUPARSE_PHILOX_ROW_H
