// Host only: an independent-items loop over the calling thread and helpers that are kept for the next call.
//
// A helper costs about 40 microseconds where each call makes its own, and reading a batch takes half a millisecond:
// with eight threads it took longer than with two. Not OpenMP: its idle workers spin beside torch's own pool, and a
// process that forks after a parallel region (as torch's DataLoader does) hangs at the next one. These sleep, and a
// forked process has helpers of its own.
#ifndef GPUPARSE_PARALLEL_H
#define GPUPARSE_PARALLEL_H

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace {

class Helpers {
 public:
  // The process's own. Never destroyed: at its end helpers may still sleep on what is in there.
  static Helpers &of_process() { return *std::launder(reinterpret_cast<Helpers *>(storage_)); }

  // Runs `work` in the calling thread, and in up to so many helpers meanwhile; returns when all that began have ended.
  void run(int64_t num_helpers, void (*work)(const void *) noexcept, const void *context) {
    Call call{work, context, num_helpers, 0, nullptr, {}};
    {
      std::lock_guard<std::mutex> lock(mutex_);
      append(&call);
      num_wanted_ += num_helpers;
      while (num_threads_ < num_busy_ + num_wanted_ && add_thread()) continue;
      wake(num_helpers);
    }
    work(context);
    std::unique_lock<std::mutex> lock(mutex_);
    if (call.num_open > 0) {  // there is nothing left to do: who has not begun need not
      num_wanted_ -= call.num_open;
      call.num_open = 0;
      remove(&call);
    }
    call.ended.wait(lock, [&] { return call.num_running == 0; });
  }

 private:
  struct Call {
    void (*work)(const void *) noexcept;
    const void *context;
    int64_t num_open;  // helpers that may still join
    int64_t num_running;
    Call *next;
    std::condition_variable ended;
  };

  // When the library is loaded. A forked process has none of the threads, and nobody who would unlock the mutex.
  static bool begin() {
    new (storage_) Helpers;
    return pthread_atfork([] { of_process().mutex_.lock(); }, [] { of_process().mutex_.unlock(); },
                          [] { new (storage_) Helpers; }) == 0;
  }

  bool add_thread() {
    try {
      std::thread thread([this] { help(); });
      pthread_setname_np(thread.native_handle(), "gpuparse-helper");
      thread.detach();
    } catch (const std::system_error &) {
      return false;  // no more threads to be had: the ones there are finish the work
    }
    ++num_threads_;
    return true;
  }

  // Each that wakes wakes two more: with many of them the last has not waited for all others.
  void wake(int64_t num_open) {
    for (int64_t i = 0; i < num_open && i < 2; ++i) woken_.notify_one();
  }

  void help() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      woken_.wait(lock, [this] { return first_ != nullptr; });
      Call *call = first_;
      --num_wanted_, ++num_busy_, ++call->num_running;
      if (--call->num_open == 0) remove(call);
      wake(num_wanted_);
      lock.unlock();
      call->work(call->context);
      lock.lock();
      --num_busy_;
      if (--call->num_running == 0) call->ended.notify_one();  // under the lock: the call is gone soon after
    }
  }

  void append(Call *call) {
    Call **place = &first_;
    while (*place != nullptr) place = &(*place)->next;
    *place = call;
  }

  void remove(Call *call) {
    Call **place = &first_;
    while (*place != call) place = &(*place)->next;
    *place = call->next;
  }

  alignas(std::max_align_t) static unsigned char storage_[];
  static const bool begun_;

  std::mutex mutex_;
  std::condition_variable woken_;
  Call *first_ = nullptr;  // the calls that helpers may still join, oldest first
  int64_t num_threads_ = 0, num_busy_ = 0, num_wanted_ = 0;
};

alignas(std::max_align_t) unsigned char Helpers::storage_[sizeof(Helpers)];
const bool Helpers::begun_ = Helpers::begin();

}  // namespace

template <typename Body>
static void parallel_for(int64_t num_items, int num_threads, const Body &body) {
  struct Loop {
    const Body &body;
    int64_t num_items;
    std::atomic<int64_t> next;
  } loop{body, num_items, {0}};
  const auto work = [](const void *context) noexcept {
    Loop &loop = *static_cast<Loop *>(const_cast<void *>(context));
    for (int64_t item = loop.next.fetch_add(1); item < loop.num_items; item = loop.next.fetch_add(1)) loop.body(item);
  };
  const int64_t num_helpers = (num_threads < num_items ? num_threads : num_items) - 1;
  if (num_helpers > 0)
    Helpers::of_process().run(num_helpers, work, &loop);
  else
    work(&loop);
}

#endif  // GPUPARSE_PARALLEL_H
