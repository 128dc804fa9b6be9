// Host only: stores past the cache, for outputs that are larger than it and not read again by whoever writes them. An
// ordinary store first reads the line it writes to, which doubles the traffic.
#ifndef GPUPARSE_STREAM_H
#define GPUPARSE_STREAM_H

#include <cstdint>
#include <cstring>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

// Copies a row that lies in the cache.
static inline void stream_row(void *out, const void *row, int64_t num_bytes) {
#ifdef __SSE2__
  if (((uintptr_t)out | (uintptr_t)num_bytes) % sizeof(__m128i) == 0) {
    for (int64_t i = 0; i < num_bytes / (int64_t)sizeof(__m128i); ++i)
      _mm_stream_si128((__m128i *)out + i, _mm_loadu_si128((const __m128i *)row + i));
    return;
  }
#endif
  memcpy(out, row, num_bytes);
}

// Makes streamed rows visible to other threads before anything that follows.
static inline void stream_fence() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

#endif  // GPUPARSE_STREAM_H
