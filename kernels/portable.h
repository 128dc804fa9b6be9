// What lets one source be compiled by NVRTC (GPU) and by the host's C++ compiler (CPU).
//
// Float arithmetic goes through gp_add, gp_mul and gp_fma: on the device they name the rounding (so that the
// compiler may not fuse them), on the host the library is built with -ffp-contract=off. Both give the same bits.
#ifndef GPUPARSE_PORTABLE_H
#define GPUPARSE_PORTABLE_H

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define GPUPARSE_DEVICE 1
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef int int32_t;
typedef long long int64_t;
#define GP_FN static __host__ __device__ __forceinline__
#define GP_RESTRICT __restrict__
#else
#include <cmath>
#include <cstdint>
#include <cstring>
#define GP_FN static inline __attribute__((always_inline))
#define GP_RESTRICT __restrict__
#endif

#if defined(__CUDA_ARCH__)
GP_FN float gp_add(float a, float b) { return __fadd_rn(a, b); }
GP_FN float gp_sub(float a, float b) { return __fsub_rn(a, b); }
GP_FN float gp_mul(float a, float b) { return __fmul_rn(a, b); }
GP_FN float gp_fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
GP_FN float gp_div(float a, float b) { return __fdiv_rn(a, b); }
GP_FN float gp_sqrt(float a) { return __fsqrt_rn(a); }
GP_FN float gp_round_even(float a) { return rintf(a); }
GP_FN uint32_t gp_float_bits(float a) { return __float_as_uint(a); }
GP_FN float gp_bits_float(uint32_t a) { return __uint_as_float(a); }
#else
GP_FN float gp_add(float a, float b) { return a + b; }
GP_FN float gp_sub(float a, float b) { return a - b; }
GP_FN float gp_mul(float a, float b) { return a * b; }
GP_FN float gp_fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
GP_FN float gp_div(float a, float b) { return a / b; }
GP_FN float gp_sqrt(float a) { return __builtin_sqrtf(a); }
GP_FN float gp_round_even(float a) { return __builtin_rintf(a); }
GP_FN uint32_t gp_float_bits(float a) {
  uint32_t bits;
  __builtin_memcpy(&bits, &a, 4);
  return bits;
}
GP_FN float gp_bits_float(uint32_t a) {
  float value;
  __builtin_memcpy(&value, &a, 4);
  return value;
}
#endif

// What one memory instruction of a GPU moves at most; addresses are multiples of its size.
#ifdef GPUPARSE_DEVICE
struct alignas(16) Bytes16 {
#else
struct __attribute__((may_alias, aligned(16))) Bytes16 {
#endif
  uint32_t words[4];
};

GP_FN int32_t gp_min(int32_t a, int32_t b) { return a < b ? a : b; }
GP_FN int32_t gp_max(int32_t a, int32_t b) { return a > b ? a : b; }

// GP_KERNEL(name, count, (parameters), (arguments)): from a body `name_element(int64_t element, parameters)` makes a
// grid-stride kernel `name` on the device, or `name_elements`, the same elements in a plain loop, on the host.
#define GP_UNWRAP(...) __VA_ARGS__
#ifdef GPUPARSE_DEVICE
#define GP_KERNEL(name, parameters, arguments)                                                                      \
  extern "C" __global__ void name(int64_t num_elements, GP_UNWRAP parameters) {                                     \
    const int64_t step = (int64_t)gridDim.x * blockDim.x;                                                           \
    for (int64_t element = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; element < num_elements; element += step) \
      name##_element(element, GP_UNWRAP arguments);                                                                 \
  }
#else
#define GP_KERNEL(name, parameters, arguments)                                                                 \
  extern "C" void name##_elements(int64_t num_elements, GP_UNWRAP parameters) {                                \
    for (int64_t element = 0; element < num_elements; ++element) name##_element(element, GP_UNWRAP arguments); \
  }
#endif

#endif  // GPUPARSE_PORTABLE_H
