// Host only: an independent-items loop over std::thread.
//
// Not OpenMP: its idle workers spin beside torch's own pool, and a process that forks after a parallel region (as
// torch's DataLoader does) hangs at the next one. Threads made per call cost about 20 microseconds each and leave
// nothing behind.
#ifndef GPUPARSE_PARALLEL_H
#define GPUPARSE_PARALLEL_H

#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

template <typename Body>
static void parallel_for(int64_t num_items, int num_threads, const Body &body) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t item = next.fetch_add(1); item < num_items; item = next.fetch_add(1)) body(item);
  };
  std::vector<std::thread> helpers;
  const int64_t num_helpers = (num_threads < num_items ? num_threads : num_items) - 1;
  try {
    for (int64_t i = 0; i < num_helpers; ++i) helpers.emplace_back(work);
  } catch (const std::system_error &) {
    // No more threads to be had: the ones there are finish the work.
  }
  work();
  for (std::thread &helper : helpers) helper.join();
}

#endif  // GPUPARSE_PARALLEL_H
