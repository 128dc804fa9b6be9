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
#define GP_LOOP _Pragma("unroll 1")  // large bodies stay in the cache of instructions only where there is one of each
#else
#include <cmath>
#include <cstdint>
#include <cstring>
#define GP_FN static inline __attribute__((always_inline))
#define GP_RESTRICT __restrict__
#define GP_UNROLL
#define GP_LOOP
#endif

#if defined(__CUDA_ARCH__)
// In PTX, since CuPy compiles with -ftz=true behind all options, which makes intrinsics lose the smallest numbers.
#define GP_FLOAT_OPERATION(name, parameters, operation, ...) \
  GP_FN float name parameters {                              \
    float result;                                            \
    asm(operation : "=f"(result) : __VA_ARGS__);             \
    return result;                                           \
  }
GP_FLOAT_OPERATION(gp_add, (float a, float b), "add.rn.f32 %0, %1, %2;", "f"(a), "f"(b))
GP_FLOAT_OPERATION(gp_sub, (float a, float b), "sub.rn.f32 %0, %1, %2;", "f"(a), "f"(b))
GP_FLOAT_OPERATION(gp_mul, (float a, float b), "mul.rn.f32 %0, %1, %2;", "f"(a), "f"(b))
GP_FLOAT_OPERATION(gp_fma, (float a, float b, float c), "fma.rn.f32 %0, %1, %2, %3;", "f"(a), "f"(b), "f"(c))
GP_FLOAT_OPERATION(gp_div, (float a, float b), "div.rn.f32 %0, %1, %2;", "f"(a), "f"(b))
GP_FLOAT_OPERATION(gp_sqrt, (float a), "sqrt.rn.f32 %0, %1;", "f"(a))
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

// A load of what no kernel at work writes.
#if defined(__CUDA_ARCH__)
GP_FN uint32_t gp_load(const uint8_t *address) { return __ldg(address); }
GP_FN uint32_t gp_load(const Bytes4 *address) { return __ldg((const unsigned int *)address); }
#else
GP_FN uint32_t gp_load(const uint8_t *address) { return *address; }
GP_FN uint32_t gp_load(const Bytes4 *address) { return address->words[0]; }
#endif

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

#if defined(__CUDA_ARCH__)
GP_FN uint32_t gp_reverse_bytes(uint32_t word) { return __byte_perm(word, 0, 0x0123); }
#else
GP_FN uint32_t gp_reverse_bytes(uint32_t word) { return __builtin_bswap32(word); }
#endif

GP_FN int32_t gp_min(int32_t a, int32_t b) { return a < b ? a : b; }
GP_FN int32_t gp_max(int32_t a, int32_t b) { return a > b ? a : b; }
// The place in a row of `length` that is nearest to `place`.
GP_FN int32_t gp_nearest(int32_t place, int32_t length) { return gp_min(gp_max(place, 0), length - 1); }

// A byte as a float, or one of a word's four, the lowest first. At 2^23 a float's last bit is worth 1, so a byte fits
// into the low bits of that number; a GPU converts several times as slowly as it adds.
#if defined(__CUDA_ARCH__)
GP_FN float gp_byte_float(uint32_t byte) { return gp_sub(gp_bits_float(0x4b000000u | byte), 8388608.0f); }
GP_FN float gp_byte_float(uint32_t word, int32_t byte) {
  return gp_sub(gp_bits_float(__byte_perm(word, 0x4b000000u, 0x7540u | byte)), 8388608.0f);
}
#else
GP_FN float gp_byte_float(uint32_t byte) { return (float)(int32_t)byte; }
GP_FN float gp_byte_float(uint32_t word, int32_t byte) { return (float)(int32_t)(word >> 8 * byte & 255u); }
#endif

// GP_KERNEL(name, (parameters), (arguments)): from a body `name_element(int64_t element, parameters)` makes a
// grid-stride kernel `name` on the device, or `name_elements`, the same elements in a plain loop, on the host.
//
// GP_BLOCK_KERNEL(name, Shared, (parameters), (arguments)): from a body `name_block(int64_t block, Shared &shared,
// parameters)`, the work of kBlockThreads threads together, which are as many elements, a kernel `name` on the device,
// of which each block of threads does one, or `name_elements`, one after the other on the host. Such a body consists of
// parts `GP_THREADS(thread) {...}`: on the device each thread runs a part and waits for the others behind it; on the
// host one part after the other is run for all threads. From part to part only `shared` is kept, and what is the same
// for all threads.
enum { kBlockThreads = 256, kWarpThreads = 32 };
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
#define GP_BLOCK_KERNEL(name, Shared, parameters, arguments)                                                          \
  extern "C" __global__ void __launch_bounds__(256, GP_MIN_BLOCKS) name(int64_t num_elements, GP_UNWRAP parameters) { \
    __shared__ Shared shared;                                                                                         \
    name##_block(blockIdx.x, shared, GP_UNWRAP arguments);                                                            \
  }
#else
#define GP_KERNEL(name, parameters, arguments)                                                                 \
  extern "C" void name##_elements(int64_t num_elements, GP_UNWRAP parameters) {                                \
    for (int64_t element = 0; element < num_elements; ++element) name##_element(element, GP_UNWRAP arguments); \
  }
#define GP_BLOCK_KERNEL(name, Shared, parameters, arguments)                    \
  extern "C" void name##_elements(int64_t num_elements, GP_UNWRAP parameters) { \
    Shared shared;                                                              \
    for (int64_t block = 0; block * kBlockThreads < num_elements; ++block) {    \
      memset(&shared, 0x7f, sizeof(shared)); /* what nobody wrote shows */      \
      name##_block(block, shared, GP_UNWRAP arguments);                         \
    }                                                                           \
  }
#endif
#if defined(__CUDA_ARCH__)
#define GP_THREADS(thread) for (int32_t thread = threadIdx.x, once = 1; once; once = 0, __syncthreads())
#else
// In any order: a test chooses odd steps, each of which comes by all threads.
extern "C" int32_t gpuparse_thread_step;
#define GP_THREADS(thread)                                         \
  for (int32_t gp_count = 0, thread = 0; gp_count < kBlockThreads; \
       ++gp_count, thread = gp_count * gpuparse_thread_step % kBlockThreads)
#endif

#endif  // GPUPARSE_PORTABLE_H
