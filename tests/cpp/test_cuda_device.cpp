// What a CUDA device does beyond the contract, on a simulated runtime: errors, upload ring, pinned
// memory, methods of copying. The contract itself is in test_device_contract.cpp.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "core/check.h"
#include "cuda/cuda_device.h"
#include "cuda/simulated_runtime.h"
#include "cuda_world.h"
#include "watchdog.h"

using namespace pagedkv;

TEST_CASE("an error names the call, CUDA's words and what to do") {
  CudaWorld w;
  for (const auto& [function, code, advice] :
       std::vector<std::tuple<const char*, int, const char*>>{
           {"cudaStreamCreateWithFlags", kOutOfMemory, "free device memory"},
           {"cudaStreamCreateWithFlags", 35, "update the NVIDIA driver"},
           {"cudaStreamCreateWithFlags", 100, "no CUDA device"},
           {"cudaStreamCreateWithFlags", 209, "compute capability"},
           {"cudaStreamCreateWithFlags", 400, "another device's"}}) {
    w.runtime->fail(function, code);
    const std::string text = message([&] { w.device->make_stream(); });
    CHECK(contains(text, function));
    CHECK(contains(text, ("error " + std::to_string(code)).c_str()));
    CHECK(contains(text, advice));
  }
  w.device->make_stream();  // and nothing is the worse for it
  w.check_nothing_left();
}

TEST_CASE("a call that fails leaves the device usable, whichever it is") {
  for (const char* function : {"cudaGetDevice", "cudaSetDevice", "cudaStreamCreateWithFlags",
                               "cudaEventCreate", "cudaEventRecord", "cudaStreamWaitEvent",
                               "cudaMemcpyAsync", "cudaMemcpyBatchAsync", "transfer_blocks"}) {
    for (const CopyMethod method : kCopyMethods) {
      CAPTURE(function);
      CudaWorld w;
      w.device->methods().always(method);
      std::byte* const host = w.device->allocate_host(4096);
      std::vector<std::byte> memory(4096, std::byte{7});
      const std::vector<CopyRun> runs{{host, memory.data(), 1024},
                                      {host + 2048, memory.data() + 2048, 1024}};
      const auto work = [&] {
        const Stream stream = w.device->make_stream();
        const Event before = w.device->record(w.device->compute_stream());
        w.device->fence(stream, before, FenceSite::transfer_after_compute);
        w.device->recycle(before);
        w.device->copy(stream, runs);
        const Event end = w.device->record(stream);
        const bool done = w.device->wait(end) == Status::done;
        const std::string failure = w.device->failure(end);
        w.device->recycle(end);
        if (!done) throw DeviceError(failure);
      };
      int current = -1;
      static_cast<void>(w.runtime->set_device(1));  // so that the device has to be changed
      w.runtime->fail(function, kOutOfMemory);
      if (const std::string text = message(work); text != "no error") {
        CHECK(contains(text, function));
      }
      static_cast<void>(w.runtime->get_device(&current));
      CHECK(current == 1);
      work();
      static_cast<void>(w.runtime->get_device(&current));
      CHECK(current == 1);
      static_cast<void>(w.runtime->set_device(0));
      CHECK(host[1023] == std::byte{7});
      w.device->free_host(host, 4096);
      w.check_nothing_left();
    }
  }
}

TEST_CASE("a copy of which a part was refused has failed, once the rest of it has ended") {
  CudaWorld w;
  w.device->methods().always(CopyMethod::loop);
  std::byte* const host = w.device->allocate_host(4096);
  std::vector<std::byte> memory(4096, std::byte{7});
  const Stream stream = w.device->make_stream();
  const std::vector<CopyRun> runs{{host, memory.data(), 1024}, {host + 2048, memory.data(), 1024}};
  w.runtime->fail("cudaMemcpyAsync", kOutOfMemory, 2);
  w.device->copy(stream, runs);
  const Event other = w.device->record(w.device->make_stream());
  const Event end = w.device->record(stream), next = w.device->record(stream);
  CHECK(w.runtime->machine().num_pending() > 0);
  CHECK(w.device->poll(end) == Status::pending);  // else the rest would go over what comes next
  CHECK(w.device->wait(end) == Status::failed);
  CHECK(host[1023] == std::byte{7});
  CHECK(contains(w.device->failure(end), "cudaMemcpyAsync"));
  CHECK(w.device->wait(next) == Status::done);
  CHECK(w.device->wait(other) == Status::done);
  for (const Event event : {other, end, next}) w.device->recycle(event);
  w.device->free_host(host, 4096);
  w.check_nothing_left();
}

TEST_CASE("an error that CUDA does not get over makes the device lost, and close() works") {
  for (const char* function : {"cudaEventQuery", "cudaEventRecord", "cudaMemcpyAsync",
                               "cudaStreamWaitEvent", "cudaEventSynchronize", "cudaSetDevice"}) {
    CAPTURE(function);
    CudaWorld w;
    w.device->methods().always(CopyMethod::loop);
    std::byte* const host = w.device->allocate_host(4096);
    std::vector<std::byte> memory(4096);
    const Stream stream = w.device->make_stream();
    const Event event = w.device->record(stream);
    w.runtime->fail(function, kIllegalAddress);
    static_cast<void>(w.runtime->set_device(std::string(function) == "cudaSetDevice"));
    bool failed = false;
    const auto expect_failure = [&](auto&& call) {
      try {
        failed |= call();
      } catch (const DeviceError&) {
        failed = true;
      }
    };
    const CopyRun run{host, memory.data(), 4096};
    expect_failure([&] { return w.device->copy(stream, {&run, 1}), false; });
    expect_failure([&] { return w.device->record(stream), false; });
    expect_failure([&] { return w.device->fence(stream, event, FenceSite{}), false; });
    expect_failure([&] { return w.device->poll(event) == Status::failed; });
    expect_failure([&] { return w.device->wait(event) == Status::failed; });
    CHECK(failed);
    CHECK(contains(message([&] { w.device->make_stream(); }), "restart"));
    w.device->recycle(event);
    w.device->free_host(host, 4096);
    w.device->close();
    w.device->close();
    CHECK(contains(message([&] { w.device->make_stream(); }), "closed"));
  }
}

TEST_CASE("a stream may be taken that is being captured already, as torch.cuda.graph does") {
  CudaWorld w;
  CudaStream stream = nullptr;
  REQUIRE(w.runtime->create_stream(&stream) == 0);
  w.runtime->capture(stream, true);
  w.device->use_stream(stream);
  CHECK(w.device->is_capturing(stream));
  w.runtime->capture(stream, false);
  w.device->close();
}

TEST_CASE("streams and events of others are refused") {
  CudaWorld w;
  CudaStream other = nullptr;
  REQUIRE(w.runtime->set_device(1) == 0);
  REQUIRE(w.runtime->create_stream(&other) == 0);
  REQUIRE(w.runtime->set_device(0) == 0);
  CHECK(contains(message([&] { w.device->use_stream(other); }), "one of device 1"));
  CHECK(w.device->compute_stream() == Stream{0});
  const Event event = w.device->record(w.device->compute_stream());
  w.device->recycle(event);
  CHECK_THROWS_AS(w.device->poll(event), BrokenInvariant);
  const Event next = w.device->record(w.device->compute_stream());
  CHECK(next != event);
  CHECK_THROWS_AS(w.device->recycle(event), BrokenInvariant);
  w.device->recycle(next);
  CHECK(w.device->num_live_events() == 0);
}

TEST_CASE("no slice of the ring is rewritten before its upload and its readers have ended") {
  const Watchdog watchdog(60);
  for (std::uint64_t seed = 0; seed < 40; ++seed) {
    CudaWorld w(seed == 0 ? Schedule::lazy : Schedule::random, seed, {.ring_bytes = 1024});
    CudaStream streams[2] = {nullptr, nullptr};
    REQUIRE(w.runtime->create_stream(&streams[1]) == 0);
    std::vector<int> found(64, -1);
    for (int turn = 0; turn < 64; ++turn) {
      const CudaStream stream = streams[turn % 2];
      const std::size_t bytes = turn == 40 ? 3000 : 64 * (1 + static_cast<std::size_t>(turn) % 5);
      w.device->ring().upload(
          stream, bytes, [&](std::byte* host) { std::memset(host, turn, bytes); },
          [&](std::byte* device) {
            int* const into = &found[static_cast<std::size_t>(turn)];
            w.runtime->machine().run(w.runtime->lane_of(stream), {}, [into, device, bytes, turn] {
              const bool right = std::all_of(device, device + bytes, [turn](std::byte b) {
                return b == static_cast<std::byte>(turn);
              });
              *into = right ? turn : -2;
            });
          });
    }
    w.device->synchronize(streams[0]);
    w.device->synchronize(streams[1]);
    for (int turn = 0; turn < 64; ++turn) CHECK(found[static_cast<std::size_t>(turn)] == turn);
    CHECK(w.device->ring().capacity() >= 3000);
    CHECK((seed > 0 || w.device->ring().num_waits() > 0));
    REQUIRE(w.runtime->destroy_stream(streams[1]) == 0);
    w.check_nothing_left();
  }
}

TEST_CASE("host memory is locked where it is used, ahead of that, or not at all") {
  CudaWorld w;
  std::byte* const host = w.device->allocate_host(3 * 8192 + 100);
  const std::size_t rings = 2 * w.device->ring().capacity();
  CHECK(w.runtime->num_registered_bytes() == rings);
  std::vector<std::byte> memory(8192, std::byte{7});
  const Stream stream = w.device->make_stream();
  host[8192] = std::byte{9};  // what is there stays there
  const CopyRun run{host + 2 * 8192 - 50, memory.data(), 100};
  w.device->copy(stream, {&run, 1});
  CHECK(w.runtime->num_registered_bytes() == rings + 2 * 8192);
  CHECK(host[8192] == std::byte{9});
  w.runtime->limit_registered(w.runtime->num_registered_bytes());
  const CopyRun last{host + 3 * 8192, memory.data(), 100};
  w.device->copy(stream, {&last, 1});
  CHECK(w.device->num_pageable_bytes() == 100);
  const Event end = w.device->record(stream);
  CHECK(w.device->wait(end) == Status::done);
  CHECK(host[3 * 8192 + 99] == std::byte{7});
  w.device->recycle(end);
  w.device->free_host(host, 3 * 8192 + 100);
  w.check_nothing_left();

  auto runtime = std::make_shared<SimulatedRuntime>();
  {
    constexpr std::size_t kBytes = 10 * 4096 + 1;
    PinnedMemory ahead(runtime, 0, kBytes, {.chunk_bytes = 4096});
    for (int i = 0; i < 10'000 && runtime->num_registered_bytes() < kBytes; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    CHECK(runtime->num_registered_bytes() == kBytes);
    ahead.lock_all();
    CHECK(runtime->num_calls("cudaHostRegister") == 11);
  }
  {
    PinnedMemory stopped(runtime, 0, std::size_t{4} << 20, {.chunk_bytes = 4096});
  }
  CHECK(runtime->num_registered_bytes() == 0);
}

TEST_CASE("no copy reaches from one locked chunk into the next, whatever the method") {
  for (const CopyMethod method : kCopyMethods) {
    for (const bool out : {true, false}) {
      CudaWorld w;  // chunks of 8192 bytes
      w.device->methods().always(method);
      constexpr std::size_t kBytes = 3 * 8192;
      std::byte* const host = w.device->allocate_host(kBytes);
      std::vector<std::byte> memory(kBytes);
      std::byte* const source = out ? memory.data() : host;
      std::byte* const target = out ? host : memory.data();
      for (std::size_t i = 0; i < kBytes; ++i) source[i] = static_cast<std::byte>(i * 7 / 5);
      const std::vector<CopyRun> runs{{target, source, kBytes - 4096},
                                      {target + kBytes - 4096, source + kBytes - 4096, 4096}};
      const Stream stream = w.device->make_stream();
      w.device->copy(stream, runs);
      const Event end = w.device->record(stream);
      CHECK(w.device->wait(end) == Status::done);
      CHECK(std::memcmp(target, source, kBytes) == 0);
      w.device->recycle(end);
      w.device->free_host(host, kBytes);
      w.check_nothing_left();
    }
  }
}

TEST_CASE("a kernel copies only where all memory is locked") {
  for (const bool locked_last : {true, false}) {
    CudaWorld w;
    w.device->methods().always(CopyMethod::kernel);
    std::byte* const one = w.device->allocate_host(4096);
    std::byte* const other = w.device->allocate_host(4096);
    std::byte* const locked = locked_last ? other : one;
    std::byte* const pageable = locked_last ? one : other;
    std::vector<std::byte> memory(2 * 4096, std::byte{7});
    const Stream stream = w.device->make_stream();
    const CopyRun first{locked, memory.data(), 4096};
    const CopyRun second{pageable, memory.data() + 4096, 4096};
    w.device->copy(stream, {&first, 1});
    CHECK(w.runtime->num_calls("transfer_blocks") == 1);
    w.runtime->limit_registered(w.runtime->num_registered_bytes());
    w.device->copy(stream, std::vector{first, second});
    CHECK(w.runtime->num_calls("transfer_blocks") == 1);
    CHECK(w.runtime->num_calls("cudaMemcpyAsync") >= 2);
    const Event end = w.device->record(stream);
    CHECK(w.device->wait(end) == Status::done);
    w.device->recycle(end);
    w.device->free_host(locked, 4096);
    w.device->free_host(pageable, 4096);
    w.check_nothing_left();
  }
}

TEST_CASE("a batch is never asked for on the legacy stream") {
  CudaWorld w;
  std::byte* const host = w.device->allocate_host(4096);
  std::vector<std::byte> memory(4096, std::byte{7});
  const std::vector<CopyRun> runs{{memory.data(), host, 10}, {memory.data() + 20, host + 20, 10}};
  w.device->copy(w.device->compute_stream(), runs);
  CHECK(w.runtime->num_calls("cudaMemcpyBatchAsync") == 0);
  w.device->copy(w.device->make_stream(), runs);
  CHECK(w.runtime->num_calls("cudaMemcpyBatchAsync") == 1);
  w.device->close();
  w.device->free_host(host, 4096);
}

TEST_CASE("one batch has some hundreds of copies at most") {
  CudaWorld w;
  constexpr std::size_t kCopies = 1300;
  std::byte* const host = w.device->allocate_host(2 * kCopies);
  std::vector<std::byte> memory(2 * kCopies);
  std::vector<CopyRun> runs;
  for (std::size_t i = 0; i < kCopies; ++i) {  // in pieces of a byte, with gaps
    host[2 * i] = std::byte(i % 251 + 1);
    runs.push_back({memory.data() + 2 * i, host + 2 * i, 1});
  }
  w.device->methods().always(CopyMethod::batch);
  w.device->copy(w.device->make_stream(), runs);
  CHECK(w.runtime->num_calls("cudaMemcpyBatchAsync") == 3);
  w.device->close();
  for (std::size_t i = 0; i < kCopies; ++i) CHECK(memory[2 * i] == host[2 * i]);
  w.device->free_host(host, 2 * kCopies);
}
