// Every machine there is, as a fixture of test_device_contract.cpp:
//
//   struct Fixture {
//     static constexpr std::uint64_t kSeeds;
//     explicit Fixture(std::uint64_t seed);
//     Device& device();
//     std::byte* device_memory(std::size_t bytes);  // copies can reach it, the host can not
//     void fail_copy();           // optional: the next copy fails
//     void check_nothing_else();  // optional: at the end, what else shall hold
//   };
#pragma once

#include <doctest/doctest.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "cuda/cuda_device.h"
#include "cuda/simulated_runtime.h"
#include "host/host_device.h"
#include "host/simulated_device.h"

namespace pagedkv {

struct HeapMemory {
  std::byte* device_memory(std::size_t bytes) {
    struct alignas(64) Line {
      std::byte bytes[64];
    };
    owned.push_back(std::shared_ptr<Line[]>(new Line[bytes / 64 + 1]));
    return static_cast<std::byte*>(static_cast<void*>(owned.back().get()));
  }
  std::vector<std::shared_ptr<void>> owned;
};

template <Schedule kSchedule, std::uint64_t kCount>
struct Simulated : HeapMemory {
  static constexpr std::uint64_t kSeeds = kCount;
  explicit Simulated(std::uint64_t seed) : machine({.schedule = kSchedule, .seed = seed}) {}
  Device& device() { return machine; }
  void fail_copy() { machine.fail_copy(); }
  void check_nothing_else() {
    CHECK(machine.violations().empty());
    CHECK(machine.host_bytes() == 0);
  }
  SimulatedDevice machine;
};

struct Host : HeapMemory {
  static constexpr std::uint64_t kSeeds = 20;
  explicit Host(std::uint64_t seed)
      : machine({.num_workers = 1 + static_cast<int>(seed % 3),
                 .chunk_bytes = std::size_t{100} << (seed % 8),
                 .copy = [this](std::byte* target, const std::byte* source, std::size_t bytes) {
                   if (fails.exchange(false)) throw std::runtime_error("broken on purpose");
                   std::memcpy(target, source, bytes);
                 }}) {}
  Device& device() { return machine; }
  void fail_copy() { fails = true; }
  std::atomic<bool> fails = false;
  HostDevice machine;
};

// A GPU whose runtime is simulated, its caller on one of the kinds of streams that there are.
template <std::uintptr_t kStream, CopyMethod kMethod>
struct Cuda : HeapMemory {
  static constexpr std::uint64_t kSeeds = 25;
  explicit Cuda(std::uint64_t seed)
      : runtime(std::make_shared<SimulatedRuntime>(SimulatedOptions{
            .schedule = seed == 0 ? Schedule::lazy : Schedule::random, .seed = seed})),
        machine(runtime,
                {.pinned = {.chunk_bytes = 4096, .ahead = seed % 2 == 1}, .ring_bytes = 4096}) {
    machine.methods().always(kMethod);
    auto stream = reinterpret_cast<CudaStream>(kStream);
    if (kStream > 2) REQUIRE(runtime->create_stream(&stream) == 0);
    machine.use_stream(stream);
  }
  Device& device() { return machine; }
  void fail_copy()
    requires(kMethod == CopyMethod::loop)
  {
    runtime->fail("cudaMemcpyAsync", 2);
  }
  void check_nothing_else() {
    machine.close();
    CHECK(runtime->machine().violations().empty());
    CHECK(runtime->num_registered_bytes() == 0);
    CHECK(runtime->num_allocations() == 0);
    CHECK(runtime->num_events() == 0);
    CHECK(runtime->num_streams() == (kStream > 2 ? 1 : 0));
  }
  std::shared_ptr<SimulatedRuntime> runtime;
  CudaDevice machine;
};

using CudaLegacy = Cuda<0, CopyMethod::batch>;
using CudaPerThread = Cuda<2, CopyMethod::batch>;
using CudaLoop = Cuda<3, CopyMethod::loop>;
using CudaKernel = Cuda<3, CopyMethod::kernel>;

using Eager = Simulated<Schedule::eager, 1>;
using Lazy = Simulated<Schedule::lazy, 1>;
using Random = Simulated<Schedule::random, 200>;

#ifdef KV_GPU
// A GPU. The chunks are small, so that copies end within host memory as well as at its ends.
template <std::uintptr_t kStream, CopyMethod kMethod>
struct Gpu {
  static constexpr std::uint64_t kSeeds = 8;
  explicit Gpu(std::uint64_t seed)
      : runtime(real_runtime()),
        machine(runtime, {.pinned = {.chunk_bytes = 4096, .ahead = seed % 2 == 1}}) {
    if (kMethod != CopyMethod::batch || runtime->has_copy_batch())
      machine.methods().always(kMethod);
    auto stream = reinterpret_cast<CudaStream>(kStream);
    if (kStream > 2) {
      REQUIRE(runtime->create_stream(&own) == 0);
      stream = own;
    }
    machine.use_stream(stream);
  }
  ~Gpu() {
    CHECK_NOTHROW(machine.close());
    for (void* memory : owned) CHECK(runtime->free(memory) == 0);
    if (own != nullptr) CHECK(runtime->destroy_stream(own) == 0);
  }
  Device& device() { return machine; }
  std::byte* device_memory(std::size_t bytes) {
    void* memory = nullptr;
    REQUIRE(runtime->allocate(&memory, bytes) == 0);
    owned.push_back(memory);
    return static_cast<std::byte*>(memory);
  }
  std::shared_ptr<CudaRuntime> runtime;
  CudaStream own = nullptr;
  std::vector<void*> owned;
  CudaDevice machine;
};

using GpuLegacy = Gpu<0, CopyMethod::loop>;
using GpuPerThread = Gpu<2, CopyMethod::batch>;
using GpuBatch = Gpu<3, CopyMethod::batch>;
using GpuKernel = Gpu<3, CopyMethod::kernel>;
#define KV_MACHINES GpuLegacy, GpuPerThread, GpuBatch, GpuKernel
#else
#define KV_MACHINES Eager, Lazy, Random, Host, CudaLegacy, CudaPerThread, CudaLoop, CudaKernel
#endif

}  // namespace pagedkv
