// The CPU library's single translation unit: the kernels' bodies and their host drivers.
#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif

#include "augment_tiles.cu"
#include "host_augment.cpp"
#include "host_encode.cpp"
#include "host_gather.cpp"
#include "host_inflate.cpp"
#include "host_locate.cpp"
#include "host_prepare.cpp"
#include "host_presence.cpp"
#include "host_random.cpp"
#include "host_read.cpp"
#include "place.cu"

int32_t gpuparse_thread_step = 1;

extern "C" const char *gpuparse_source_digest() { return GPUPARSE_SOURCE_DIGEST; }

// 1 where the processor runs the AVX2 build of this library.
extern "C" int gpuparse_supports_avx2() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
#else
  return 0;
#endif
}
