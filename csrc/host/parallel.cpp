#include "host/parallel.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

namespace pagedkv {

namespace {

using Turn = std::function<void(std::int64_t, int)>;

class Helpers {
 public:
  // False where another loop has them, or they are of the process that this one was forked from.
  bool run(int num_helpers, std::int64_t count, const Turn& work) {
    if (getpid() != process_ || busy_.test_and_set(std::memory_order_acquire)) return false;
    {
      const std::lock_guard lock(mutex_);
      start(num_helpers);
      work_ = &work;
      count_ = count;
      next_ = 0;
      num_wanted_ = std::min(num_helpers, num_started_);
    }
    wake_.notify_all();
    take_turns(0);
    {
      std::unique_lock lock(mutex_);
      num_wanted_ = 0;  // helpers that wake from now on have nothing to do
      done_.wait(lock, [this] { return num_working_ == 0; });
    }
    busy_.clear(std::memory_order_release);
    return true;
  }

 private:
  void start(int num_helpers) {
    try {
      while (num_started_ < num_helpers) {
        std::thread([this, thread = num_started_ + 1] { help(thread); }).detach();
        ++num_started_;
      }
    } catch (const std::exception&) {
      // No more threads are to be had, so these are enough.
    }
  }

  [[noreturn]] void help(int thread) {
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return thread <= num_wanted_; });
      ++num_working_;
      lock.unlock();
      take_turns(thread);
      lock.lock();
      // Whoever finds no turn left ends the loop for all, so that nobody wakes for nothing twice.
      num_wanted_ = 0;
      if (--num_working_ == 0) done_.notify_one();
    }
  }

  void take_turns(int thread) {
    for (std::int64_t i = next_++; i < count_; i = next_++) (*work_)(i, thread);
  }

  const pid_t process_ = getpid();
  std::atomic_flag busy_;  // set by whose loop it is
  std::mutex mutex_;       // guards what follows
  std::condition_variable wake_, done_;
  int num_started_ = 0;
  int num_wanted_ = 0;  // helpers with a number up to this one are asked to join
  int num_working_ = 0;
  const Turn* work_ = nullptr;
  std::int64_t count_ = 0;
  std::atomic<std::int64_t> next_ = 0;
};

}  // namespace

void parallel_for(int num_threads, std::int64_t count, const Turn& work) {
  // Never destroyed: its threads sleep in it until the process ends.
  static Helpers& helpers = *new Helpers;
  const int num_helpers = static_cast<int>(std::min<std::int64_t>(num_threads, count)) - 1;
  if (num_helpers > 0 && helpers.run(num_helpers, count, work)) return;
  for (std::int64_t i = 0; i < count; ++i) work(i, 0);
}

}  // namespace pagedkv
