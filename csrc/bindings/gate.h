// Guards an object that Python holds: one call at a time, and none after a broken invariant.
#pragma once

#include <atomic>
#include <string>
#include <utility>

#include "core/check.h"
#include "core/error.h"

namespace pagedkv {

class ConcurrentUse : public Error {
 public:
  ConcurrentUse()
      : Error("another thread, or a callback, is inside this manager: use it from one at a time") {}
};

class Poisoned : public BrokenInvariant {
 public:
  using BrokenInvariant::BrokenInvariant;
};

class Gate {
 public:
  // call(), unless somebody is inside. Whoever is inside may let other Python threads run.
  template <class F>
  auto enter(F&& call) {
    struct Guard {
      explicit Guard(std::atomic<bool>& flag) : busy(flag) {
        if (busy.exchange(true, std::memory_order_acquire)) throw ConcurrentUse();
      }
      ~Guard() { busy.store(false, std::memory_order_release); }
      std::atomic<bool>& busy;
    } guard(busy_);
    if (!defect_.empty()) [[unlikely]] {
      throw Poisoned("this manager met a defect of pagedkv and refuses further use: " + defect_);
    }
    try {
      return std::forward<F>(call)();
    } catch (const BrokenInvariant& e) {
      defect_ = e.what();
      throw;
    }
  }

 private:
  std::atomic<bool> busy_{false};
  std::string defect_;  // what poisoned it
};

}  // namespace pagedkv
