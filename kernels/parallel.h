// Host only: an independent-items loop over the calling thread and helpers that are kept for the next call.
//
// A helper costs about 40 microseconds where each call makes its own, and reading a batch takes half a millisecond:
// with eight threads it took longer than with two. Not OpenMP: its idle workers spin beside torch's own pool, and a
// process that forks after a parallel region (as torch's DataLoader does) hangs at the next one. These sleep, and a
// forked process has helpers of its own.
#ifndef GPUPARSE_PARALLEL_H
#define GPUPARSE_PARALLEL_H

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace {

class Helpers {
 public:
  // The process's own. Never destroyed: at its end helpers may still sleep on what is in there.
  static Helpers &of_process() { return *own_; }

  // Runs `work` in the calling thread, and in up to so many helpers meanwhile; returns when all that began have ended.
  void run(int64_t num_helpers, void (*work)(void *) noexcept, void *context) {
    Call call{work, context, num_helpers, 0, {}};
    {
      std::lock_guard<std::mutex> lock(mutex_);
      open_.push_back(&call);
      while (num_threads_ < num_busy_ + num_wanted() && add_thread()) continue;
      wake();
    }
    work(context);
    std::unique_lock<std::mutex> lock(mutex_);
    if (call.num_open > 0) close(&call);  // there is nothing left to do: who has not begun need not
    call.ended.wait(lock, [&] { return call.num_running == 0; });
  }

 private:
  struct Call {
    void (*work)(void *) noexcept;
    void *context;
    int64_t num_open;  // helpers that may still join
    int64_t num_running;
    std::condition_variable ended;
  };

  // When the library is loaded. A forked process has none of the threads, and nobody who would unlock the mutex.
  static Helpers *begin() {
    own_ = new Helpers;
    pthread_atfork([] { own_->mutex_.lock(); }, [] { own_->mutex_.unlock(); }, [] { own_ = new Helpers; });
    return own_;
  }

  bool add_thread() {
    try {
      std::thread thread([this] { help(); });
      pthread_setname_np(thread.native_handle(), "gpuparse-helper");
      thread.detach();
    } catch (const std::exception &) {
      return false;  // no more threads or memory to be had: the ones there are finish the work
    }
    ++num_threads_;
    return true;
  }

  // Each that wakes wakes two more: with many of them the last has not waited for all others.
  void wake() {
    const int64_t most = num_wanted();
    for (int64_t i = 0; i < most && i < 2; ++i) woken_.notify_one();
  }

  void help() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      woken_.wait(lock, [this] { return !open_.empty(); });
      Call *call = open_.front();
      ++num_busy_, ++call->num_running;
      if (--call->num_open == 0) close(call);
      wake();
      lock.unlock();
      call->work(call->context);
      lock.lock();
      --num_busy_;
      if (--call->num_running == 0) call->ended.notify_one();  // under the lock: the call is gone soon after
    }
  }

  int64_t num_wanted() const {
    int64_t sum = 0;
    for (const Call *call : open_) sum += call->num_open;
    return sum;
  }

  void close(Call *call) { open_.erase(std::find(open_.begin(), open_.end(), call)); }

  static Helpers *own_;

  std::mutex mutex_;
  std::condition_variable woken_;
  std::vector<Call *> open_;  // the calls that helpers may still join, oldest first
  int64_t num_threads_ = 0, num_busy_ = 0;
};

Helpers *Helpers::own_ = Helpers::begin();

}  // namespace

template <typename Body>
static void parallel_for(int64_t num_items, int num_threads, const Body &body) {
  struct Loop {
    const Body &body;
    int64_t num_items;
    std::atomic<int64_t> next;
  } loop{body, num_items, {0}};
  const auto work = [](void *context) noexcept {
    Loop &loop = *static_cast<Loop *>(context);
    for (int64_t item = loop.next.fetch_add(1); item < loop.num_items; item = loop.next.fetch_add(1)) loop.body(item);
  };
  const int64_t num_helpers = (num_threads < num_items ? num_threads : num_items) - 1;
  if (num_helpers > 0)
    Helpers::of_process().run(num_helpers, work, &loop);
  else
    work(&loop);
}

#endif  // GPUPARSE_PARALLEL_H
