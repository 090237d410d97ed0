// What a CUDA device may not do, on a simulated runtime that refuses it as CUDA does: copy across
// registrations, touch another device, work on a stream that is being captured, give memory back
// that is in use, use CUDA in a forked child.
#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "core/block_manager.h"
#include "cuda/cuda_device.h"
#include "cuda/cuda_pool.h"
#include "cuda/simulated_runtime.h"
#include "cuda_world.h"

using namespace pagedkv;

namespace {

constexpr std::size_t kChunk = 8192;

struct Machine {
  explicit Machine(CudaOptions options = {.ring_bytes = 65536}) {
    options.pinned = {.chunk_bytes = kChunk, .ahead = false};
    device = std::make_shared<CudaDevice>(runtime, options);
  }

  CudaStream callers_stream() {
    CudaStream stream = nullptr;
    REQUIRE(runtime->create_stream(&stream) == 0);
    return stream;
  }
  std::size_t num_pending() const { return runtime->machine().num_pending(); }

  std::shared_ptr<SimulatedRuntime> runtime = std::make_shared<SimulatedRuntime>(
      SimulatedOptions{.schedule = Schedule::lazy}, /*num_devices=*/2);
  std::shared_ptr<CudaDevice> device;
};

// Into host memory, under way on a stream that nobody else knows.
struct UnrecordedCopy {
  explicit UnrecordedCopy(CudaDevice& device) : host(device.allocate_host(4096)) {
    const CopyRun run{host, memory.data(), memory.size()};
    device.copy(device.make_stream(), {&run, 1});
  }
  bool has_landed() const { return std::ranges::equal(memory, std::span(host, memory.size())); }

  const std::vector<std::byte> memory = std::vector<std::byte>(4096, std::byte{7});
  std::byte* const host;
};

}  // namespace

TEST_CASE("a copy over the end of a chunk becomes one for each: CUDA refuses it whole") {
  for (const CopyMethod method : kCopyMethods) {
    CAPTURE(name(method));
    Machine m;
    m.device->methods().always(method);
    std::byte* const host = m.device->allocate_host(4 * kChunk);
    std::byte* const other = m.device->allocate_host(4 * kChunk);
    std::vector<std::byte> memory(3 * kChunk);
    for (std::size_t i = 0; i < memory.size(); ++i) memory[i] = static_cast<std::byte>(i * 5 / 3);
    const Stream stream = m.device->make_stream();
    const CopyRun out{host + 100, memory.data(), memory.size()};
    const CopyRun along{other + 3000, host + 100, memory.size()};  // ends of chunks on both sides
    m.device->copy(stream, {&out, 1});
    m.device->copy(stream, {&along, 1});
    m.device->synchronize(reinterpret_cast<CudaStream>(stream));
    CHECK(std::ranges::equal(memory, std::span(other + 3000, memory.size())));
    m.device->close();
    m.device->free_host(host, 4 * kChunk);
    m.device->free_host(other, 4 * kChunk);
  }
}

TEST_CASE("the kernel reads and writes no host memory but what is pinned for it") {
  Machine m;
  m.device->methods().always(CopyMethod::kernel);
  std::vector<std::byte> memory(256), pageable(256);
  std::byte* const pinned = m.device->allocate_host(256);
  const Stream stream = m.device->make_stream();
  const CopyRun good{pinned, memory.data(), 64}, bad{pageable.data(), memory.data(), 64};
  m.device->copy(stream, std::vector{bad, good});
  m.device->copy(stream, std::vector{good, bad});
  CHECK(m.runtime->num_calls("transfer_blocks") == 0);
  m.device->copy(stream, {&good, 1});
  CHECK(m.runtime->num_calls("transfer_blocks") == 1);

  m.runtime->limit_registered(m.runtime->num_registered_bytes());
  std::byte* const refused = m.device->allocate_host(256);
  const CopyRun slow{refused, memory.data(), 64};
  m.device->copy(stream, std::vector{slow, good});
  m.device->copy(stream, std::vector{good, slow});
  CHECK(m.runtime->num_calls("transfer_blocks") == 1);
  m.device->close();
  m.device->free_host(pinned, 256);
  m.device->free_host(refused, 256);
}

TEST_CASE("everything is done on the device itself, whichever is current, from any thread") {
  Machine m({.index = 1});
  std::thread([&] {  // where device 0 is current, as in every new thread
    const CudaStream own = [&] {
      REQUIRE(m.runtime->set_device(1) == 0);
      const CudaStream stream = m.callers_stream();
      REQUIRE(m.runtime->set_device(0) == 0);
      return stream;
    }();
    m.device->use_stream(own);
    std::byte* const host = m.device->allocate_host(4096);
    std::vector<std::byte> memory(4096);
    const CopyRun run{host, memory.data(), 4096};
    const Stream stream = m.device->make_stream();
    const Event first = m.device->record(m.device->compute_stream());
    m.device->fence(stream, first, FenceSite::transfer_after_compute);
    m.device->copy(stream, {&run, 1});
    const Event last = m.device->record(stream);
    m.device->poll(last);
    CHECK(m.device->wait(last) == Status::done);
    CHECK(m.device->poll(first) == Status::done);
    CHECK(m.device->seconds_between(first, last) > 0);
    m.device->recycle(first);
    m.device->recycle(last);
    m.device->calibrate();
    m.device->free_host(host, 4096);
    m.device->close();
    int current = -1;
    REQUIRE(m.runtime->get_device(&current) == 0);
    CHECK(current == 0);
  })
      .join();
  CHECK(m.runtime->num_calls_on(1) > 20);
  CHECK(m.runtime->num_calls_on(0) == 0);
}

TEST_CASE("a stream that is being captured gets no transfers, and its capture survives") {
  Machine m;
  const CudaStream stream = m.callers_stream();
  m.device->use_stream(stream);
  const Event before = m.device->record(m.device->compute_stream());
  m.runtime->capture(stream, true);
  const auto num_refused = m.runtime->num_calls("cudaEventRecord");
  CHECK(contains(message([&] { m.device->compute_stream(); }), "captured"));
  CHECK(contains(
      message([&] { m.device->ring().upload(stream, 64, [](std::byte*) {}, [](std::byte*) {}); }),
      "captured"));
  CHECK(contains(message([&] { m.device->wait(before); }), "captured"));
  CHECK(m.device->poll(before) == Status::pending);  // nobody is told that it has failed
  CHECK(m.runtime->num_calls("cudaEventRecord") == num_refused);
  CHECK(m.runtime->num_calls("cudaEventQuery") == 0);
  CHECK(m.runtime->num_calls("cudaEventSynchronize") == 0);
  m.runtime->capture(stream, false);
  CHECK(m.device->wait(before) == Status::done);
  m.device->recycle(before);
  m.device->close();
}

TEST_CASE("while another stream is being captured, events are late, and the device is not lost") {
  Machine m;
  const Event event = m.device->record(m.device->compute_stream());
  const CudaStream others = m.callers_stream();
  m.runtime->capture(others, true);
  CHECK(m.device->poll(event) == Status::pending);
  CHECK(contains(message([&] { m.device->wait(event); }), "captured"));
  m.runtime->capture(others, false);
  CHECK(m.device->wait(event) == Status::done);
  m.device->recycle(event);
  m.device->close();
}

TEST_CASE("a question about an event that is refused says nothing about its copies") {
  Machine m;
  std::byte* const host = m.device->allocate_host(4096);
  const std::vector<std::byte> memory(4096, std::byte{7});
  const CopyRun run{host, memory.data(), 4096};
  const Stream stream = m.device->make_stream();
  m.device->copy(stream, {&run, 1});
  const Event event = m.device->record(stream);
  m.runtime->fail("cudaEventQuery", kOutOfMemory);
  // Had it failed, or thrown, the engine would give away the memory that is being copied.
  CHECK(m.device->poll(event) == Status::pending);
  CHECK(m.num_pending() > 0);
  m.runtime->fail("cudaEventSynchronize", kOutOfMemory);
  CHECK(contains(message([&] { m.device->wait(event); }), "cudaEventSynchronize"));
  CHECK(m.device->wait(event) == Status::done);
  CHECK(std::ranges::equal(memory, std::span(host, 4096)));
  m.device->recycle(event);
  m.device->free_host(host, 4096);
  m.device->close();
}

TEST_CASE("kernels whose arrays are on the device already can be captured") {
  Machine m;
  std::vector<std::byte> memory(4 * 2 * 64), source(2 * 64, std::byte{7});
  const std::vector<Region> regions{{memory.data(), 128, 64}, {memory.data() + 256, 128, 64}};
  BlockManager manager(
      {.num_device_blocks = 1, .block_size = 2, .max_batch = 1, .max_model_len = 2});
  const SequenceId id = manager.create_anonymous();
  const std::int64_t count = 2;
  const StepPlan& plan = manager.append({&id, 1}, std::vector<Token>{1, 2}, std::span(&count, 1));
  const StepShape shape{1, 2, static_cast<std::int32_t>(plan.table_stride)};
  std::vector<std::byte> step_memory(StepMemory::bytes(shape) + 64);
  const auto start = reinterpret_cast<std::uintptr_t>(step_memory.data()) + 63;
  CudaPool pool(m.device, regions, 2, 2, shape, reinterpret_cast<std::byte*>(start / 64 * 64));
  const CudaStream stream = m.callers_stream();
  m.device->use_stream(stream);
  pool.begin_step(plan);
  pool.synchronize();

  m.runtime->capture(stream, true);
  CHECK(contains(message([&] { pool.begin_step(plan); }), "captured"));
  m.runtime->capture(stream, false);
  pool.begin_step(plan);
  m.runtime->capture(stream, true);
  const auto* slots =
      reinterpret_cast<const std::int64_t*>(pool.step().address(StepMemory::Array::slots));
  pool.write(0, {slots, 2}, source.data(), 64, source.data(), 64);
  m.runtime->capture(stream, false);
  pool.synchronize();
  CHECK(std::ranges::count(memory, std::byte{7}) == 2 * 128);
  m.device->close();
}

TEST_CASE("close() waits for work on streams that the caller has left, too") {
  Machine m;
  const CudaStream left = m.callers_stream();
  m.device->use_stream(left);
  m.device->ring().upload(
      left, 64, [](std::byte* to) { std::memset(to, 1, 64); }, [](std::byte*) {});
  m.device->use_stream(nullptr);
  CHECK(m.num_pending() > 0);
  m.device->close();
  CHECK(m.num_pending() == 0);
  CHECK(m.runtime->num_allocations() == 0);
}

TEST_CASE("close() waits for copies that nobody has recorded") {
  Machine m;
  const UnrecordedCopy copy(*m.device);
  m.device->close();
  CHECK(copy.has_landed());
  m.device->free_host(copy.host, 4096);
}

TEST_CASE("what close() cannot wait for is not given back, and the device stays open") {
  for (const char* function : {"cudaStreamSynchronize", "cudaGetDevice", "a capture"}) {
    CAPTURE(function);
    Machine m;
    const bool captures = std::string(function) == "a capture";
    const UnrecordedCopy copy(*m.device);
    if (captures) m.runtime->capture(nullptr, true);
    if (!captures) m.runtime->fail(function, kOutOfMemory);
    const auto num_allocations = m.runtime->num_allocations();
    CHECK(contains(message([&] { m.device->close(); }), captures ? "captured" : function));
    CHECK(m.device->is_open());
    CHECK(m.runtime->num_allocations() == num_allocations);
    CHECK(m.runtime->num_registered_bytes() > 0);
    m.runtime->capture(nullptr, false);
    m.device->close();
    CHECK_FALSE(m.device->is_open());
    CHECK(m.num_pending() == 0);
    CHECK(m.runtime->num_allocations() == 0);
    m.device->free_host(copy.host, 4096);
  }
}

TEST_CASE("a device that ends and cannot wait leaves the memory to what is under way") {
  Machine m;
  const UnrecordedCopy copy(*m.device);
  m.runtime->fail("cudaStreamSynchronize", kOutOfMemory);
  m.device.reset();
  CHECK(m.num_pending() > 0);
  m.runtime->machine().close();
  CHECK(copy.has_landed());
}

TEST_CASE("uploads wait for nobody while the ring has room") {
  Machine m({.ring_bytes = 1024});
  for (int i = 0; i < 16; ++i) {
    m.device->ring().upload(nullptr, 64, [](std::byte*) {}, [](std::byte*) {});
  }
  CHECK(m.num_pending() > 0);
  CHECK(m.device->num_host_waits() == 0);
  m.device->ring().upload(nullptr, 64, [](std::byte*) {}, [](std::byte*) {});
  CHECK(m.device->num_host_waits() == 1);
  CHECK(m.device->ring().num_waits() == 1);
  m.device->close();
}

TEST_CASE("a slice that no event guards is not given to anybody before its upload has ended") {
  for (const bool used : {true, false}) {
    Machine m({.ring_bytes = 64});
    m.runtime->fail("cudaEventRecord", kOutOfMemory);
    CHECK_FALSE(message([&] {
                  m.device->ring().upload(
                      nullptr, 64, [](std::byte* to) { std::memset(to, 1, 64); },
                      [&](std::byte*) {
                        if (!used) throw DeviceError("no launch");
                      });
                }).empty());
    CHECK(m.num_pending() > 0);
    const auto upload = [&] {
      m.device->ring().upload(
          nullptr, 64, [&](std::byte*) { CHECK(m.num_pending() == 0); }, [](std::byte*) {});
    };
    m.runtime->fail("cudaStreamSynchronize", kOutOfMemory);
    CHECK(contains(message(upload), "cudaStreamSynchronize"));
    upload();
    m.device->close();
  }
}

TEST_CASE("a ring that cannot grow stays as it was") {
  Machine m({.ring_bytes = 1024});
  const auto upload = [&](std::size_t bytes) {
    m.device->ring().upload(
        nullptr, bytes, [&](std::byte* to) { std::memset(to, 1, bytes); }, [](std::byte*) {});
  };
  upload(64);
  m.runtime->fail("cudaMalloc", kOutOfMemory);
  CHECK(contains(message([&] { upload(3000); }), "free device memory"));
  CHECK(m.device->ring().capacity() == 1024);
  CHECK(m.runtime->num_allocations() == 2);
  upload(64);
  upload(3000);
  CHECK(m.device->ring().capacity() >= 3000);
  m.device->close();
  CHECK(m.runtime->num_allocations() == 0);
  CHECK(m.runtime->num_registered_bytes() == 0);
}

TEST_CASE("time is told of events that have ended, and of no others") {
  Machine m;
  const Stream stream = m.device->make_stream();
  const Event first = m.device->record(stream), second = m.device->record(stream);
  CHECK(
      contains(message([&] { m.device->seconds_between(first, second); }), "cudaEventElapsedTime"));
  CHECK(m.device->wait(second) == Status::done);
  CHECK(m.device->seconds_between(first, second) > 0);
  m.device->recycle(first);
  m.device->recycle(second);
  m.device->close();
}

TEST_CASE("a forked child gets errors, and leaves CUDA alone") {
  Machine m;
  std::byte* const host = m.device->allocate_host(4096);
  std::vector<std::byte> memory(4096);
  const CopyRun run{host, memory.data(), 4096};
  const Stream stream = m.device->make_stream();
  m.device->copy(stream, {&run, 1});
  const Event event = m.device->record(stream);
  std::vector<std::byte> step_memory(StepMemory::bytes({1, 1, 1}));
  auto pool = std::make_unique<CudaPool>(m.device, std::vector<Region>{{memory.data(), 64, 64}}, 1,
                                         1, StepShape{1, 1, 1}, step_memory.data());
  const auto num_calls = [&] { return m.runtime->num_calls_on(0); };
  const std::int64_t before = num_calls();
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    int wrong = 0;
    const auto expect_refusal = [&](auto&& call) { wrong += !contains(message(call), "fork"); };
    expect_refusal([&] { m.device->use_stream(nullptr); });
    expect_refusal([&] { m.device->compute_stream(); });
    expect_refusal([&] { m.device->make_stream(); });
    expect_refusal([&] { m.device->copy(stream, {&run, 1}); });
    expect_refusal([&] { m.device->record(stream); });
    expect_refusal([&] { m.device->fence(stream, event, FenceSite::transfer_after_compute); });
    expect_refusal([&] { m.device->poll(event); });
    expect_refusal([&] { m.device->wait(event); });
    expect_refusal([&] { m.device->allocate_host(1); });
    expect_refusal([&] { m.device->close(); });
    m.device->free_host(host, 4096);
    pool.reset();
    m.device.reset();
    wrong += num_calls() != before;
    ::_exit(wrong);
  }
  int status = -1;
  REQUIRE(::waitpid(child, &status, 0) == child);
  CHECK(status == 0);
  pool.reset();
  CHECK(m.device->wait(event) == Status::done);  // the parent's goes on
  m.device->recycle(event);
  m.device->free_host(host, 4096);
  m.device->close();
}
