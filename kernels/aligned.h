// Host only: buffers for rows that vector instructions go along, at the start of a cache line. An allocator's chunks
// begin anywhere at multiples of 16 bytes, and a thread that is kept gets the same ones again and again.
#ifndef GPUPARSE_ALIGNED_H
#define GPUPARSE_ALIGNED_H

#include <cstddef>
#include <new>
#include <vector>

template <typename T>
struct LineAllocator {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};
  LineAllocator() = default;
  template <typename U>
  LineAllocator(const LineAllocator<U> &) {}
  T *allocate(size_t count) { return static_cast<T *>(::operator new(count * sizeof(T), kLine)); }
  void deallocate(T *memory, size_t) { ::operator delete(memory, kLine); }
  template <typename U>
  bool operator==(const LineAllocator<U> &) const {
    return true;
  }
  template <typename U>
  bool operator!=(const LineAllocator<U> &) const {
    return false;
  }
};

template <typename T>
using AlignedVector = std::vector<T, LineAllocator<T>>;

#endif  // GPUPARSE_ALIGNED_H
