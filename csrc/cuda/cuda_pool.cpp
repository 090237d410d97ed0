#include "cuda/cuda_pool.h"

#include <algorithm>
#include <cstring>

#include "cuda/kernels.h"

namespace pagedkv {

CudaPool::CudaPool(std::shared_ptr<CudaDevice> device, std::vector<Region> regions,
                   std::int32_t num_blocks, std::int32_t block_size, const StepShape& shape,
                   std::byte* step_memory)
    : device_(std::move(device)),
      checks_(std::move(regions), num_blocks, block_size),
      step_(device_, shape, step_memory) {
  Alignment all;
  for (const Region& region : checks_.regions()) {
    all.with(region);
    largest_block_bytes_ = std::max(largest_block_bytes_, region.token_bytes * block_size);
  }
  word_bytes_ = all.word_bytes();
  const CudaDevice::Guard guard(*device_);
  const std::size_t bytes = checks_.regions().size() * sizeof(Region);
  device_->check(device_->runtime().allocate(&regions_, bytes), "cudaMalloc");
  try {
    device_->ring().send(
        device_->stream(), static_cast<std::byte*>(regions_), bytes,
        [&](std::byte* host) { std::memcpy(host, checks_.regions().data(), bytes); });
    device_->synchronize(device_->stream());  // as the next call may be on another stream
  } catch (...) {
    // The upload may be under way.
    if (device_->runtime().synchronize(device_->stream()) != 0) device_->runtime().clear_error();
    if (device_->runtime().free(regions_) != 0) device_->runtime().clear_error();
    throw;
  }
}

CudaPool::~CudaPool() {
  if (device_->is_parents()) return;
  const CudaDevice::Guard guard(*device_, std::nothrow);
  if (device_->runtime().free(regions_) != 0) device_->runtime().clear_error();
}

void CudaPool::copy_blocks(std::span<const std::int32_t> copies) {
  if (copies.empty()) return;
  device_->check_open();
  const CudaDevice::Guard guard(*device_);
  const auto num_copies = static_cast<std::int64_t>(copies.size() / 3);
  if (const std::int32_t* there = step_.on_device(copies.data())) {
    return copy_blocks_there(there, num_copies);
  }
  checks_.check_copies(copies);
  device_->ring().upload(
      device_->stream(), copies.size_bytes(),
      [&](std::byte* host) { std::memcpy(host, copies.data(), copies.size_bytes()); },
      [&](std::byte* up) {
        copy_blocks_there(reinterpret_cast<const std::int32_t*>(up), num_copies);
      });
}

void CudaPool::copy_blocks_there(const std::int32_t* copies, std::int64_t num_copies) {
  device_->check_open();
  const CudaDevice::Guard guard(*device_);
  const CopyBlocks kernel = CopyBlocks::make(
      static_cast<const Region*>(regions_), static_cast<std::int32_t>(checks_.regions().size()),
      copies, static_cast<std::int32_t>(num_copies), largest_block_bytes_, word_bytes_);
  device_->check(device_->runtime().launch(kernel, device_->stream()), "copy_blocks");
}

template <class Launch>
void CudaPool::with_slots(std::span<const std::int64_t> slots, Launch&& launch) {
  if (slots.empty()) return;
  device_->check_open();
  const CudaDevice::Guard guard(*device_);
  if (const std::int64_t* there = step_.on_device(slots.data())) return launch(there);
  checks_.check_slots(0, slots);
  device_->ring().upload(
      device_->stream(), slots.size_bytes(),
      [&](std::byte* host) { std::memcpy(host, slots.data(), slots.size_bytes()); },
      [&](std::byte* up) { launch(reinterpret_cast<const std::int64_t*>(up)); });
}

void CudaPool::launch_scatter(const ScatterPart* parts, int num_parts, const std::int64_t* slots,
                              std::int64_t num_tokens) {
  device_->check_open();
  const CudaDevice::Guard guard(*device_);
  const ScatterKv kernel =
      ScatterKv::make(parts, num_parts, slots, num_tokens, checks_.block_size());
  device_->check(device_->runtime().launch(kernel, device_->stream()), "scatter_kv");
}

void CudaPool::scatter(std::size_t region, std::span<const std::int64_t> slots,
                       const std::byte* source, std::int64_t source_stride) {
  const ScatterPart part{checks_.region(region), source, source_stride};
  with_slots(slots, [&](const std::int64_t* at) {
    launch_scatter(&part, 1, at, static_cast<std::int64_t>(slots.size()));
  });
}

void CudaPool::write(std::size_t layer, std::span<const std::int64_t> slots, const std::byte* k,
                     std::int64_t k_stride, const std::byte* v, std::int64_t v_stride) {
  with_slots(slots, [&](const std::int64_t* at) {
    write_there(layer, at, static_cast<std::int64_t>(slots.size()), k, k_stride, v, v_stride);
  });
}

void CudaPool::write_there(std::size_t layer, const std::int64_t* slots, std::int64_t num_tokens,
                           const std::byte* k, std::int64_t k_stride, const std::byte* v,
                           std::int64_t v_stride) {
  const ScatterPart parts[] = {{checks_.region(2 * layer), k, k_stride},
                               {checks_.region(2 * layer + 1), v, v_stride}};
  launch_scatter(parts, 2, slots, num_tokens);
}

void CudaPool::write_fp8(std::size_t layer, std::span<const std::int64_t> slots,
                         SourceType source_type, Fp8 format, const ScatterFp8::Source& k,
                         const ScatterFp8::Source& v) {
  const ScatterFp8::Part parts[] = {{{checks_.region(2 * layer), k.data, k.stride}, k.scale},
                                    {{checks_.region(2 * layer + 1), v.data, v.stride}, v.scale}};
  with_slots(slots, [&](const std::int64_t* at) {
    const ScatterFp8 kernel =
        ScatterFp8::make(parts, 2, source_type, format, at, static_cast<std::int64_t>(slots.size()),
                         checks_.block_size());
    device_->check(device_->runtime().launch(kernel, device_->stream()), "scatter_fp8");
  });
}

void CudaPool::gather(std::size_t region, const TableView& table, std::int32_t first_block,
                      std::span<const std::int32_t> num_tokens, std::int32_t num_heads,
                      std::int32_t width, std::byte* target) {
  checks_.check_gather_shape(region, table, first_block, num_tokens, num_heads);
  if (table.num_rows == 0 || width == 0) return;
  device_->check_open();
  const CudaDevice::Guard guard(*device_);
  TableView there = table;
  there.cells = step_.on_device(table.cells);
  const std::int32_t* tokens = step_.on_device(num_tokens.data());
  const auto launch = [&] {
    launch_gather(region, there, first_block, tokens, num_heads, width, target);
  };
  if (there.cells != nullptr && tokens != nullptr) return launch();
  checks_.check_gather(region, table, first_block, num_tokens, num_heads, width);
  const std::size_t row = there.cells != nullptr ? 0 : static_cast<std::size_t>(table.width);
  const std::size_t num_cells = row * static_cast<std::size_t>(table.num_rows);
  device_->ring().upload(
      device_->stream(), (num_cells + num_tokens.size()) * sizeof(std::int32_t),
      [&](std::byte* host) {
        std::memcpy(host, num_tokens.data(), num_tokens.size_bytes());
        host += num_tokens.size_bytes();
        for (std::int32_t b = 0; row > 0 && b < table.num_rows; ++b, host += 4 * row) {
          std::memcpy(host, table.cells + b * table.stride, 4 * row);
        }
      },
      [&](std::byte* up) {
        tokens = reinterpret_cast<const std::int32_t*>(up);
        if (there.cells == nullptr) {
          there.cells = tokens + num_tokens.size();
          there.stride = table.width;
        }
        launch();
      });
}

void CudaPool::gather_there(std::size_t region, const TableView& table,
                            const std::int32_t* num_tokens, std::int32_t num_heads,
                            std::int32_t width, std::byte* target) {
  launch_gather(region, table, 0, num_tokens, num_heads, width, target);
}

void CudaPool::launch_gather(std::size_t region, const TableView& table, std::int32_t first_block,
                             const std::int32_t* num_tokens, std::int32_t num_heads,
                             std::int32_t width, std::byte* target) {
  device_->check_open();
  const CudaDevice::Guard guard(*device_);
  const GatherKv kernel = GatherKv::make(checks_.region(region), table, first_block, num_tokens,
                                         num_heads, width, checks_.block_size(), target);
  device_->check(device_->runtime().launch(kernel, device_->stream()), "gather_kv");
}

void CudaPool::synchronize() {
  if (device_->is_open()) device_->synchronize_callers();
}

}  // namespace pagedkv
