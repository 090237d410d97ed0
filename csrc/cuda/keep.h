// For memory that may still be in use, and whose last use nobody can wait for: never given back.
#pragma once

#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace pagedkv {

// It stays reachable, so that a leak checker does not take it for a leak.
template <class T>
void keep_for_good(std::unique_ptr<T> memory) noexcept {
  static std::mutex mutex;
  try {
    static auto& kept = *new std::vector<std::unique_ptr<T>>;  // which no exit destroys
    const std::lock_guard lock(mutex);
    kept.push_back(std::move(memory));
  } catch (const std::bad_alloc&) {
    static_cast<void>(memory.release());
  }
}

}  // namespace pagedkv
