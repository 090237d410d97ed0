// The pool of a CUDA device: what a step does is launched on the caller's stream, and nobody waits.
// Tensors and arrays are in memory that the device can read, and nothing of them is looked at here.
#pragma once

#include <memory>
#include <vector>

#include "cuda/cuda_device.h"
#include "cuda/scatter_fp8.h"
#include "cuda/step_memory.h"
#include "host/host_pool.h"

namespace pagedkv {

class CudaPool final : public Pool {
 public:
  // Blocks 0 .. num_blocks - 1 exist in every region. `step_memory` is device memory of
  // StepMemory::bytes(shape) bytes.
  CudaPool(std::shared_ptr<CudaDevice> device, std::vector<Region> regions, std::int32_t num_blocks,
           std::int32_t block_size, const StepShape& shape, std::byte* step_memory);
  ~CudaPool() override;

  void begin_step(const StepPlan& plan) override;
  const StepMemory& step() const { return step_; }

  void copy_blocks(std::span<const std::int32_t> copies) override;
  void scatter(std::size_t region, std::span<const std::int64_t> slots, const std::byte* source,
               std::int64_t source_stride) override;
  void write(std::size_t layer, std::span<const std::int64_t> slots, const std::byte* k,
             std::int64_t k_stride, const std::byte* v, std::int64_t v_stride) override;
  // write() into pools of 8-bit floats, from a wider type: stored is value / scale, rounded.
  void write_fp8(std::size_t layer, std::span<const std::int64_t> slots, SourceType source_type,
                 Fp8 format, const ScatterFp8::Source& k, const ScatterFp8::Source& v);
  void gather(std::size_t region, const TableView& table, std::int32_t first_block,
              std::span<const std::int32_t> num_tokens, std::int32_t num_heads, std::int32_t width,
              std::byte* target) override;
  void synchronize() override;

 private:
  template <class Kernel>
  void launch(const Kernel& kernel, const char* name);
  void scatter(const ScatterPart* parts, int num_parts, std::span<const std::int64_t> slots);

  const std::shared_ptr<CudaDevice> device_;
  const HostPool shapes_;  // of the regions; touches no memory
  std::int64_t largest_block_bytes_ = 0;
  int word_bytes_ = 16;
  void* regions_ = nullptr;  // on the device
  StepMemory step_;
};

}  // namespace pagedkv
