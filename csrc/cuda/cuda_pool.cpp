#include "cuda/cuda_pool.h"

#include <algorithm>
#include <cstring>

#include "cuda/kernels.h"

namespace pagedkv {

CudaPool::CudaPool(std::shared_ptr<CudaDevice> device, std::vector<Region> regions,
                   std::int32_t num_blocks, std::int32_t block_size, const StepShape& shape,
                   std::byte* step_memory)
    : device_(std::move(device)),
      shapes_(std::move(regions), num_blocks, block_size),
      step_(device_, shape, step_memory) {
  Alignment all;
  for (const Region& region : shapes_.regions()) {
    all.with(region);
    largest_block_bytes_ = std::max(largest_block_bytes_, region.token_bytes * block_size);
  }
  word_bytes_ = all.word_bytes();
  const CudaDevice::Guard guard(*device_);
  device_->ring().fit(StepMemory::bytes(shape));
  const std::size_t bytes = shapes_.regions().size() * sizeof(Region);
  device_->check(device_->runtime().allocate(&regions_, bytes), "cudaMalloc");
  try {
    device_->ring().send(
        device_->stream(), static_cast<std::byte*>(regions_), bytes,
        [&](std::byte* host) { std::memcpy(host, shapes_.regions().data(), bytes); });
    device_->synchronize(device_->stream());  // as the next call may be on another stream
  } catch (...) {
    const bool is_free = device_->is_at_rest(device_->stream());  // of the upload
    if (is_free && device_->runtime().free(regions_) != 0) device_->runtime().clear_error();
    throw;
  }
}

CudaPool::~CudaPool() {
  if (device_->is_parents()) return;
  try {
    synchronize();
  } catch (const DeviceError&) {
    if (device_->is_open()) return;  // kernels may be under way that read the regions
  }
  const CudaDevice::Guard guard(*device_, std::nothrow);
  if (device_->runtime().free(regions_) != 0) device_->runtime().clear_error();
}

template <class Kernel>
void CudaPool::launch(const Kernel& kernel, const char* name) {
  device_->check_open();
  const CudaDevice::Guard guard(*device_);
  device_->check(device_->runtime().launch(kernel, device_->stream()), name);
}

void CudaPool::begin_step(const StepPlan& plan) {
  shapes_.check_copies(cells_of(plan.copies));
  step_.upload(plan);
  if (plan.copies.empty()) return;
  const auto* copies =
      reinterpret_cast<const std::int32_t*>(step_.address(StepMemory::Array::copies));
  copy_blocks({copies, 3 * plan.copies.size()});
}

void CudaPool::copy_blocks(std::span<const std::int32_t> copies) {
  launch(CopyBlocks::make(static_cast<const Region*>(regions_),
                          static_cast<std::int32_t>(shapes_.regions().size()), copies.data(),
                          static_cast<std::int32_t>(copies.size() / 3), largest_block_bytes_,
                          word_bytes_),
         "copy_blocks");
}

void CudaPool::scatter(const ScatterPart* parts, int num_parts,
                       std::span<const std::int64_t> slots) {
  launch(ScatterKv::make(parts, num_parts, slots.data(), static_cast<std::int64_t>(slots.size()),
                         shapes_.block_size()),
         "scatter_kv");
}

void CudaPool::scatter(std::size_t region, std::span<const std::int64_t> slots,
                       const std::byte* source, std::int64_t source_stride) {
  const ScatterPart part{shapes_.region(region), source, source_stride};
  scatter(&part, 1, slots);
}

void CudaPool::write(std::size_t layer, std::span<const std::int64_t> slots, const std::byte* k,
                     std::int64_t k_stride, const std::byte* v, std::int64_t v_stride) {
  const ScatterPart parts[] = {{shapes_.region(2 * layer), k, k_stride},
                               {shapes_.region(2 * layer + 1), v, v_stride}};
  scatter(parts, 2, slots);
}

void CudaPool::write_fp8(std::size_t layer, std::span<const std::int64_t> slots,
                         SourceType source_type, Fp8 format, const ScatterFp8::Source& k,
                         const ScatterFp8::Source& v) {
  const ScatterFp8::Part parts[] = {{{shapes_.region(2 * layer), k.data, k.stride}, k.scale},
                                    {{shapes_.region(2 * layer + 1), v.data, v.stride}, v.scale}};
  launch(ScatterFp8::make(parts, 2, source_type, format, slots.data(),
                          static_cast<std::int64_t>(slots.size()), shapes_.block_size()),
         "scatter_fp8");
}

void CudaPool::gather(std::size_t region, const TableView& table, std::int32_t first_block,
                      std::span<const std::int32_t> num_tokens, std::int32_t num_heads,
                      std::int32_t width, std::byte* target) {
  shapes_.check_gather_shape(region, table, first_block, num_tokens, num_heads);
  if (table.num_rows == 0 || width == 0) return;
  launch(GatherKv::make(shapes_.region(region), table, first_block, num_tokens.data(), num_heads,
                        width, shapes_.block_size(), target),
         "gather_kv");
}

void CudaPool::synchronize() {
  if (device_->is_open()) device_->synchronize_callers();
}

}  // namespace pagedkv
