// What there is no memory for changes nothing. Every allocation of this program comes by here.
#include <doctest/doctest.h>

#include <cstdlib>
#include <new>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "core/block_manager.h"

using namespace pagedkv;

namespace {

thread_local long left = -1;  // allocations until one fails; negative: none does

void* allocate(std::size_t size, std::size_t alignment) {
  if (left >= 0 && left-- == 0) throw std::bad_alloc();
  const std::size_t whole = (size + alignment - 1) / alignment * alignment;
  void* const memory = std::aligned_alloc(alignment, whole > 0 ? whole : alignment);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

// Whether there is memory for call() if its allocation number k, from 0 on, fails.
template <class F>
bool succeeds_without(long k, F&& call) {
  left = k;
  try {
    call();
    left = -1;
    return true;
  } catch (const std::bad_alloc&) {
    left = -1;
    return false;
  }
}

}  // namespace

// GCC warns where it inlines one of a pair alone.
#pragma GCC diagnostic ignored "-Wmismatched-new-delete"
void* operator new(std::size_t n) { return allocate(n, alignof(std::max_align_t)); }
void* operator new(std::size_t n, std::align_val_t alignment) {
  return allocate(n, static_cast<std::size_t>(alignment));
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }

TEST_CASE("a transfer that there is no memory for uses up no number") {
  Config config;
  config.num_device_blocks = config.num_host_blocks = 8;
  config.block_size = 4;
  std::vector<Token> prompt(13);
  std::iota(prompt.begin(), prompt.end(), 0);
  const std::int64_t count = 13;
  int failed = 0;
  for (bool done = false; !done; ++failed) {
    BlockManager m(config);
    const SequenceId id = m.create(prompt, "");
    m.commit(m.append({&id, 1}, prompt, std::span(&count, 1)).step);
    TransferPlan plan;
    const auto move = [&] { plan = m.swap_out({&id, 1}); };
    done = succeeds_without(failed, move);
    if (!done) {
      CHECK(m.transfers().empty());
      move();
    }
    CHECK(plan.id == TransferId{1});
    m.verify();
  }
  CHECK(failed > 4);
}

TEST_CASE("all salts are cleared without memory") {
  Config config;
  config.num_device_blocks = 8;
  BlockManager m(config);
  const std::string salt(100, 'x');
  for (const char c : {'a', 'b', 'c'}) m.create(std::vector<Token>{1, 2, 3}, salt + c);
  CHECK(succeeds_without(0, [&] { m.clear(std::nullopt); }));
  m.verify();
}
