// The pool of a simulated device: what a step does is queued on the compute stream, and runs when
// the device's schedule says. gather() gives its result to the host, so it waits for that stream.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "host/host_pool.h"
#include "host/simulated_device.h"

namespace pagedkv {

class SimulatedPool final : public Pool {
 public:
  SimulatedPool(std::shared_ptr<SimulatedDevice> device, std::vector<Region> regions,
                std::int32_t num_blocks, std::int32_t block_size);
  ~SimulatedPool() override;  // synchronize(), whatever comes of it

  void copy_blocks(std::span<const std::int32_t> copies) override;
  void scatter(std::size_t region, std::span<const std::int64_t> slots, const std::byte* source,
               std::int64_t source_stride) override;
  void gather(std::size_t region, const TableView& table, std::int32_t first_block,
              std::span<const std::int32_t> num_tokens, std::int32_t num_heads, std::int32_t width,
              std::byte* target) override;
  void synchronize() override;

 private:
  void queue(std::span<const Access> accesses, std::function<void()> work);

  std::shared_ptr<SimulatedDevice> device_;
  std::shared_ptr<HostPool> memory_;
  std::vector<Stream> used_;  // compute streams that got work
};

}  // namespace pagedkv
