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
#define GP_UNROLL _Pragma("unroll")  // arrays stay in registers only where their indices are known
#else
#include <cmath>
#include <cstdint>
#include <cstring>
#define GP_FN static inline __attribute__((always_inline))
#define GP_RESTRICT __restrict__
#define GP_UNROLL
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

// What memory instructions of a GPU move at once; addresses are multiples of the sizes.
#ifdef GPUPARSE_DEVICE
#define GP_WIDE(bytes) alignas(bytes)
#else
#define GP_WIDE(bytes) __attribute__((may_alias, aligned(bytes)))
#endif
struct GP_WIDE(16) Bytes16 {
  uint32_t words[4];
};
struct GP_WIDE(8) Bytes8 {
  uint32_t words[2];
};
struct GP_WIDE(4) Bytes4 {
  uint32_t words[1];
};

// Stores past the cache: what a batch's outputs are is not read again by the kernel that makes them.
#if defined(__CUDA_ARCH__)
GP_FN void gp_stream(void *address, Bytes16 value) {
  __stcs((uint4 *)address, make_uint4(value.words[0], value.words[1], value.words[2], value.words[3]));
}
GP_FN void gp_stream(void *address, Bytes8 value) {
  __stcs((uint2 *)address, make_uint2(value.words[0], value.words[1]));
}
GP_FN void gp_stream(void *address, Bytes4 value) { __stcs((unsigned int *)address, value.words[0]); }
#else
GP_FN void gp_stream(void *address, Bytes16 value) { *(Bytes16 *)address = value; }
GP_FN void gp_stream(void *address, Bytes8 value) { *(Bytes8 *)address = value; }
GP_FN void gp_stream(void *address, Bytes4 value) { *(Bytes4 *)address = value; }
#endif

// Quotient of a non-negative number; a GPU divides 32 bits several times faster than 64.
GP_FN int64_t gp_divide(int64_t value, int32_t divisor) {
  return value <= 0x7fffffff ? (int64_t)((uint32_t)value / (uint32_t)divisor) : value / divisor;
}

GP_FN int32_t gp_min(int32_t a, int32_t b) { return a < b ? a : b; }
GP_FN int32_t gp_max(int32_t a, int32_t b) { return a > b ? a : b; }

// GP_KERNEL(name, count, (parameters), (arguments)): from a body `name_element(int64_t element, parameters)` makes a
// grid-stride kernel `name` on the device, or `name_elements`, the same elements in a plain loop, on the host.
#define GP_UNWRAP(...) __VA_ARGS__
#ifdef GPUPARSE_DEVICE
#ifndef GP_MIN_BLOCKS
#define GP_MIN_BLOCKS \
  4  // of 256 threads that fit on a multiprocessor: a few spilled registers cost less than idle units
#endif
#define GP_KERNEL(name, parameters, arguments)                                                                        \
  extern "C" __global__ void __launch_bounds__(256, GP_MIN_BLOCKS) name(int64_t num_elements, GP_UNWRAP parameters) { \
    const int64_t step = (int64_t)gridDim.x * blockDim.x;                                                             \
    for (int64_t element = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; element < num_elements; element += step)   \
      name##_element(element, GP_UNWRAP arguments);                                                                   \
  }
#else
#define GP_KERNEL(name, parameters, arguments)                                                                 \
  extern "C" void name##_elements(int64_t num_elements, GP_UNWRAP parameters) {                                \
    for (int64_t element = 0; element < num_elements; ++element) name##_element(element, GP_UNWRAP arguments); \
  }
#endif

#endif  // GPUPARSE_PORTABLE_H
