// The pool of a CUDA device on a simulated runtime: beside the host pool, and under a manager.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "core/block_manager.h"
#include "cuda/cuda_pool.h"
#include "cuda/simulated_runtime.h"

using namespace pagedkv;

namespace {

constexpr std::int32_t kBlocks = 12;
constexpr std::int32_t kBlockSize = 4;
constexpr std::int64_t kTokenBytes = 48;
constexpr std::int32_t kRegions = 4;
constexpr StepShape kShape{8, 20, 16};

struct World {
  explicit World(std::uint64_t seed)
      : runtime(std::make_shared<SimulatedRuntime>(SimulatedOptions{
            .schedule = seed == 0 ? Schedule::lazy : Schedule::random, .seed = seed})),
        device(std::make_shared<CudaDevice>(
            runtime, CudaOptions{.pinned = {.ahead = false}, .ring_bytes = 2048})),
        random(seed),
        step_memory(StepMemory::bytes(kShape) + 64) {
    for (int i = 0; i < 2; ++i) {
      memory[i].resize(kRegions * kBlocks * kBlockSize * kTokenBytes / sizeof(std::uint64_t));
    }
    for (std::uint64_t& word : memory[0]) word = random();
    memory[1] = memory[0];
    auto aligned = (reinterpret_cast<std::uintptr_t>(step_memory.data()) + 63) / 64 * 64;
    pool = std::make_unique<CudaPool>(device, regions(0), kBlocks, kBlockSize, kShape,
                                      reinterpret_cast<std::byte*>(aligned));
    host = std::make_unique<HostPool>(regions(1), kBlocks, kBlockSize);
  }

  std::vector<Region> regions(int which) {
    std::vector<Region> list;
    auto* base = reinterpret_cast<std::byte*>(memory[which].data());
    for (std::int32_t r = 0; r < kRegions; ++r) {
      list.push_back(
          {base + r * kBlockSize * kTokenBytes, kRegions * kBlockSize * kTokenBytes, kTokenBytes});
    }
    return list;
  }

  void other_stream() {  // as a caller does who orders his streams himself
    device->synchronize(device->stream());
    device->use_stream(reinterpret_cast<CudaStream>(std::uintptr_t{random() % 2 * 2}));
  }

  std::int32_t below(std::int32_t n) {
    return static_cast<std::int32_t>(random() % static_cast<std::uint64_t>(n));
  }

  void check_nothing_left() {
    pool->synchronize();
    pool.reset();
    device->close();
    CHECK(runtime->num_allocations() == 0);
    CHECK(runtime->num_events() == 0);
    CHECK(runtime->num_registered_bytes() == 0);
    CHECK(runtime->machine().violations().empty());
  }

  std::shared_ptr<SimulatedRuntime> runtime;
  std::shared_ptr<CudaDevice> device;
  std::mt19937_64 random;
  std::vector<std::uint64_t> memory[2];
  std::vector<std::byte> step_memory;
  std::unique_ptr<CudaPool> pool;
  std::unique_ptr<HostPool> host;
};

// What the device has of a plan, byte for byte, padding among it.
void compare(const StepMemory& step, const StepPlan& plan) {
  using Array = StepMemory::Array;
  const auto same = [&](Array array, const auto* host, std::size_t count) {
    const std::byte* there = step.address(array);
    return there != nullptr && std::memcmp(there, host, count * sizeof *host) == 0;
  };
  const auto batch = static_cast<std::size_t>(plan.batch_size);
  const auto tokens = static_cast<std::size_t>(plan.num_tokens);
  CHECK(same(Array::query_starts, plan.query_starts, batch + 1));
  CHECK(same(Array::seq_lens, plan.seq_lens, batch));
  if (!plan.copies.empty()) CHECK(same(Array::copies, plan.copies.data(), plan.copies.size()));
  if (plan.num_tokens <= kShape.max_tokens) {
    CHECK(same(Array::slots, plan.slots, tokens));
    CHECK(same(Array::positions, plan.positions, tokens));
    CHECK(same(Array::input_ids, plan.input_ids, tokens));
  } else {
    CHECK(step.address(Array::slots) == nullptr);
  }
  const auto* cells = reinterpret_cast<const BlockId*>(step.address(Array::block_tables));
  for (std::size_t row = 0; row < batch; ++row) {
    const BlockId* host = plan.block_tables + row * static_cast<std::size_t>(plan.table_stride);
    CHECK(std::equal(host, host + plan.table_width, cells + row * kShape.table_stride));
  }
  // Behind it, what a kernel for a larger step may read: nothing to do.
  const auto* lens = reinterpret_cast<const std::int32_t*>(step.address(Array::seq_lens));
  const auto* starts = reinterpret_cast<const std::int32_t*>(step.address(Array::query_starts));
  for (std::size_t row = batch; row < static_cast<std::size_t>(kShape.max_batch); ++row) {
    CHECK(lens[row] == 0);
    CHECK(starts[row + 1] == plan.num_tokens);
  }
  const auto* slots = reinterpret_cast<const std::int64_t*>(step.address(Array::slots));
  for (std::size_t t = tokens; slots != nullptr && t < std::size_t(kShape.max_batch); ++t) {
    CHECK(slots[t] == 0);
  }
}

}  // namespace

TEST_CASE("a CUDA pool ends as the host pool, however late its kernels run") {
  for (std::uint64_t seed = 0; seed < 60; ++seed) {
    CAPTURE(seed);
    World w(seed);
    std::vector<std::vector<std::byte>> sources, found, expected;
    std::deque<std::vector<std::int32_t>> arrays;  // which the kernels read when their turn comes
    std::deque<std::vector<std::int64_t>> places;
    for (int turn = 0; turn < 30; ++turn) {
      if (w.below(6) == 0) w.other_stream();
      const int what = w.below(3);
      if (what == 0) {
        const auto& copies = arrays.emplace_back(
            std::vector<std::int32_t>{w.below(6), 6 + w.below(3), w.below(kBlockSize + 1),
                                      w.below(6), 9 + w.below(3), w.below(kBlockSize + 1)});
        w.pool->copy_blocks(copies);
        w.host->copy_blocks(copies);
      } else if (what == 1) {
        std::vector<std::int64_t>& slots = places.emplace_back(kBlocks * kBlockSize);
        std::iota(slots.begin(), slots.end(), 0);
        std::ranges::shuffle(slots, w.random);
        slots.resize(static_cast<std::size_t>(w.below(20)));
        sources.emplace_back(slots.size() * 2 * kTokenBytes + 1);
        for (std::byte& b : sources.back()) b = static_cast<std::byte>(w.random());
        const std::byte* k = sources.back().data();
        const std::byte* v = k + kTokenBytes;
        const auto layer = static_cast<std::size_t>(w.below(2));
        w.pool->write(layer, slots, k, 2 * kTokenBytes, v, 2 * kTokenBytes);
        w.host->write(layer, slots, k, 2 * kTokenBytes, v, 2 * kTokenBytes);
        w.pool->scatter(3, slots, k, 2 * kTokenBytes);
        w.host->scatter(3, slots, k, 2 * kTokenBytes);
      } else {
        std::vector<std::int32_t>& table = arrays.emplace_back(3 * 5);
        std::vector<std::int32_t>& tokens = arrays.emplace_back(3);
        for (std::int32_t& cell : table) cell = w.below(kBlocks);
        for (std::int32_t& n : tokens) n = w.below(4 * kBlockSize + 1);
        const std::int32_t width = *std::ranges::max_element(tokens);
        for (auto* target : {&found, &expected}) {
          target->emplace_back(static_cast<std::size_t>(3 * width * kTokenBytes));
        }
        const TableView view{table.data(), 5, 3, 5};
        w.pool->gather(1, view, 1, tokens, 2, width, found.back().data());
        w.host->gather(1, view, 1, tokens, 2, width, expected.back().data());
      }
    }
    w.pool->synchronize();
    CHECK(w.memory[0] == w.memory[1]);
    CHECK(found == expected);
    w.check_nothing_left();
  }
}

TEST_CASE("what can be seen to be wrong is refused before anything is queued") {
  World w(1);
  const std::vector<std::byte> source(64);
  const std::int64_t slots[] = {0};
  const std::int32_t table[] = {1}, tokens[] = {1};
  std::byte target[48];
  CHECK_THROWS_AS(w.pool->scatter(4, slots, source.data(), 48), InvalidSpec);
  CHECK_THROWS_AS(w.pool->gather(0, {table, 1, 1, 1}, 0, tokens, 5, 1, target), InvalidSpec);
  CHECK_THROWS_AS(w.pool->gather(0, {table, 1, 2, 1}, 0, tokens, 1, 1, target), InvalidSpec);
  const BlockCopy copy{BlockId{0}, BlockId{kBlocks}, 1};
  StepPlan plan;
  plan.copies = {&copy, 1};
  CHECK_THROWS_AS(w.pool->begin_step(plan), InvalidSpec);
  CHECK(w.runtime->num_calls("scatter_kv") == 0);
  CHECK(w.runtime->num_calls("copy_blocks") == 0);
  CHECK(w.runtime->num_calls("gather_kv") == 0);
  w.check_nothing_left();
}

TEST_CASE("a step goes up in one copy: its arrays, its copies and the changes of its tables") {
  World w(1);
  BlockManager manager({.num_device_blocks = 60,
                        .block_size = kBlockSize,
                        .max_batch = kShape.max_batch,
                        .max_model_len = kShape.table_stride * kBlockSize});
  std::vector<SequenceId> ids{manager.create_anonymous()};
  std::int64_t num_copies = 0, num_updates = 0;
  for (int turn = 0; turn < 12; ++turn) {
    if (turn == 2) {
      ids = manager.fork(ids[0], 3);
    }
    const StepPlan& plan = manager.append(ids, std::vector<Token>(ids.size()),
                                          std::vector<std::int64_t>(ids.size(), 1));
    const std::int64_t before = w.runtime->num_calls("cudaMemcpyAsync");
    w.pool->begin_step(plan);
    CHECK(w.runtime->num_calls("cudaMemcpyAsync") == before + 1);
    num_copies += static_cast<std::int64_t>(plan.copies.size());
    num_updates += static_cast<std::int64_t>(plan.table_updates.size());
    manager.commit(plan.step);
  }
  CHECK(num_copies == 2);
  CHECK(num_updates > 6);
  w.check_nothing_left();
}

TEST_CASE("a plan with tables no wider than its longest row goes up as the manager's own would") {
  World w(1);
  BlockManager manager({.num_device_blocks = 60,
                        .block_size = kBlockSize,
                        .max_batch = kShape.max_batch,
                        .max_model_len = kShape.table_stride * kBlockSize});
  std::vector<SequenceId> ids{manager.create_anonymous(), manager.create_anonymous()};
  StepPlan plan;
  std::vector<BlockId> narrow;
  for (const std::int64_t count : {9, 1, 12, 1, 2, 1}) {
    if (count == 2) {  // a short sequence in the row of a long one, behind it what was there
      manager.release(ids);
      ids = {manager.create_anonymous(), manager.create_anonymous()};
    }
    const std::int64_t counts[] = {count, 1};
    plan = manager.append(ids, std::vector<Token>(static_cast<std::size_t>(count) + 1), counts);
    narrow.clear();
    for (std::int32_t row = 0; row < plan.batch_size; ++row) {
      const BlockId* from = plan.block_tables + std::int64_t{row} * plan.table_stride;
      narrow.insert(narrow.end(), from, from + plan.table_width);
    }
    narrow.shrink_to_fit();  // what is read behind it is an error under a sanitizer
    StepPlan value = plan;
    value.block_tables = narrow.data();
    value.table_stride = plan.table_width;
    w.pool->begin_step(value);
    w.pool->synchronize();
    compare(w.pool->step(), plan);
    const auto* cells =
        reinterpret_cast<const BlockId*>(w.pool->step().address(StepMemory::Array::block_tables));
    for (std::int32_t row = 0; row < plan.batch_size; ++row) {
      const std::int64_t at = std::int64_t{row} * kShape.table_stride;
      CHECK(std::equal(cells + at, cells + at + kShape.table_stride, plan.block_tables + at));
    }
    manager.commit(plan.step);
  }
  w.check_nothing_left();
}

TEST_CASE("a plan that is larger than the step memory is refused") {
  World w(1);
  StepPlan plan;
  plan.batch_size = kShape.max_batch + 1;
  CHECK_THROWS_AS(w.pool->begin_step(plan), InvalidSpec);
  plan.batch_size = 1;
  plan.table_width = kShape.table_stride + 1;
  CHECK_THROWS_AS(w.pool->begin_step(plan), InvalidSpec);
  plan.table_width = 1;
  const TableUpdate update{0, 0, kShape.table_stride + 1};
  plan.table_updates = {&update, 1};
  CHECK_THROWS_AS(w.pool->begin_step(plan), InvalidSpec);
  const BlockCopy copy{BlockId{1}, BlockId{kBlocks}, 1};
  plan.copies = {&copy, 1};
  CHECK_THROWS_AS(w.pool->begin_step(plan), InvalidSpec);
  CHECK(w.runtime->num_calls("cudaMemcpyAsync") == 1);  // that of the pool itself
  w.check_nothing_left();
}

TEST_CASE("a pool whose memory is refused leaves nothing behind") {
  for (const char* function : {"cudaMalloc", "cudaMemcpyAsync", "cudaEventRecord"}) {
    World w(1);
    w.runtime->fail(function, 2);
    CHECK_THROWS_AS(CudaPool(w.device, w.regions(0), kBlocks, kBlockSize, kShape, nullptr),
                    DeviceError);
    w.check_nothing_left();
  }
}

TEST_CASE("a pool that ends waits for its kernels, or leaves them what they read") {
  const std::int32_t copies[] = {1, 2, kBlockSize};
  for (const bool refused : {false, true}) {
    CAPTURE(refused);
    World w(0);
    w.pool->copy_blocks(copies);
    CHECK(w.runtime->machine().num_pending() > 0);
    const std::size_t num_allocations = w.runtime->num_allocations();
    if (refused) w.runtime->fail("cudaStreamSynchronize", 2);
    w.pool.reset();
    CHECK((w.runtime->machine().num_pending() > 0) == refused);
    CHECK(w.runtime->num_allocations() == num_allocations - (refused ? 0 : 1));
    w.device->close();
  }
}

TEST_CASE("a step's arrays on the device are the plan's, whatever happened to the step before") {
  for (std::uint64_t seed = 0; seed < 60; ++seed) {
    CAPTURE(seed);
    World w(seed);
    BlockManager manager({.num_device_blocks = 60,
                          .block_size = kBlockSize,
                          .max_batch = kShape.max_batch,
                          .max_model_len = kShape.table_stride * kBlockSize});
    std::vector<SequenceId> ids;
    int num_uploads = 0;
    for (int turn = 0; turn < 60; ++turn) {
      while (ids.size() < 6) ids.push_back(manager.create_anonymous());
      std::ranges::shuffle(ids, w.random);
      const std::vector<SequenceId> batch(ids.begin(), ids.begin() + 1 + w.below(6));
      std::vector<std::int64_t> counts(batch.size());
      for (std::int64_t& n : counts) n = w.below(5) == 0 ? 4 + w.below(3) : 1;
      std::vector<Token> tokens(
          static_cast<std::size_t>(std::accumulate(counts.begin(), counts.end(), std::int64_t{0})));
      for (Token& t : tokens) t = w.below(100);
      const StepPlan* plan = nullptr;
      try {
        plan = &manager.append(batch, tokens, counts);
      } catch (const Error&) {  // too long, or no block is left
        manager.release(ids);
        ids.clear();
        continue;
      }
      const int fate = w.below(8);
      if (fate == 0) {  // it never gets here
        manager.rollback(plan->step);
        continue;
      }
      if (fate == 1) w.runtime->fail(w.below(2) ? "cudaMemcpyAsync" : "update_tables", 2);
      try {
        w.pool->begin_step(*plan);
      } catch (const DeviceError&) {
        manager.rollback(plan->step);
        continue;
      }
      ++num_uploads;
      w.pool->synchronize();
      compare(w.pool->step(), *plan);
      if (w.below(4) == 0) {
        manager.rollback(plan->step);
      } else {
        manager.commit(plan->step);
      }
    }
    CHECK(num_uploads > 20);
    w.check_nothing_left();
  }
}
