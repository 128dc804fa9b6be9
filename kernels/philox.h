// Counter-based random numbers: Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
// and normals by the Box-Muller transform. log and sincos are built here from operations that IEEE 754 fixes to the
// last bit, so that the CPU and the GPU draw the same noise.
#ifndef GPUPARSE_PHILOX_H
#define GPUPARSE_PHILOX_H

#include "portable.h"

struct PhiloxWords {
  uint32_t w0, w1, w2, w3;
};

GP_FN PhiloxWords philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t key0, uint32_t key1) {
  for (int32_t round = 0; round < 10; ++round) {
    const uint64_t left = (uint64_t)0xD2511F53u * c0;
    const uint64_t right = (uint64_t)0xCD9E8D57u * c2;
    c0 = (uint32_t)(right >> 32) ^ c1 ^ key0;
    c1 = (uint32_t)right;
    c2 = (uint32_t)(left >> 32) ^ c3 ^ key1;
    c3 = (uint32_t)left;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

// ln(u) for u in (0, 1]: u = m * 2^e with m in [sqrt(1/2), sqrt(2)), ln m = 2 atanh(s), s = (m - 1) / (m + 1), by its
// Taylor series; |s| < 0.1716, so the first term left out is below 3e-9.
GP_FN float gp_log(float u) {
  const uint32_t bits = gp_float_bits(u);
  const uint32_t shifted = bits - 0x3f3504f3u;  // the bits of sqrt(1/2): moves the cut between exponents there
  const int32_t exponent = (int32_t)shifted >> 23;
  const float m = gp_bits_float(bits - ((uint32_t)exponent << 23));
  const float s = gp_div(gp_sub(m, 1.0f), gp_add(m, 1.0f));
  const float s2 = gp_mul(s, s);
  float series = 1.0f / 9.0f;
  series = gp_fma(series, s2, 1.0f / 7.0f);
  series = gp_fma(series, s2, 1.0f / 5.0f);
  series = gp_fma(series, s2, 1.0f / 3.0f);
  series = gp_fma(series, s2, 1.0f);
  return gp_fma((float)exponent, 0.693147180559945f, gp_mul(gp_add(s, s), series));
}

struct SinCos {
  float sine, cosine;
};

// sin and cos of 2 pi * word / 2^32: the nearest quarter turn is split off in integers, the rest (at most pi/4) goes
// through Taylor series whose first terms left out are below 2e-9.
GP_FN SinCos gp_sincos_turn(uint32_t word) {
  const uint32_t quarter = (word + 0x20000000u) >> 30;
  const int32_t rest = (int32_t)(word - (quarter << 30));
  const float a = gp_mul((float)rest, 1.4629180792671596e-9f);  // 2 pi / 2^32
  const float a2 = gp_mul(a, a);
  float sine = 1.0f / 362880.0f;
  sine = gp_fma(sine, a2, -1.0f / 5040.0f);
  sine = gp_fma(sine, a2, 1.0f / 120.0f);
  sine = gp_fma(sine, a2, -1.0f / 6.0f);
  sine = gp_fma(gp_mul(sine, a2), a, a);
  float cosine = -1.0f / 3628800.0f;
  cosine = gp_fma(cosine, a2, 1.0f / 40320.0f);
  cosine = gp_fma(cosine, a2, -1.0f / 720.0f);
  cosine = gp_fma(cosine, a2, 1.0f / 24.0f);
  cosine = gp_fma(cosine, a2, -0.5f);
  cosine = gp_fma(cosine, a2, 1.0f);
  const float x = quarter & 1 ? cosine : sine;
  const float y = quarter & 1 ? sine : cosine;
  return {quarter & 2 ? -x : x, (quarter + 1) & 2 ? -y : y};
}

struct NormalPair {
  float first, second;
};

// Two standard normals from two words. The uniform is ((word >> 8) + 1/2) / 2^24, rounded to float32: never 0, at most
// 1 (where the radius is 0); the tail ends at 5.9.
GP_FN NormalPair gp_normal_pair(uint32_t radius_word, uint32_t angle_word) {
  const float u = gp_mul(gp_add((float)(int32_t)(radius_word >> 8), 0.5f), 5.9604644775390625e-8f);
  const float radius = gp_sqrt(gp_mul(-2.0f, gp_log(u)));
  const SinCos turn = gp_sincos_turn(angle_word);
  return {gp_mul(radius, turn.cosine), gp_mul(radius, turn.sine)};
}

#endif  // GPUPARSE_PHILOX_H
