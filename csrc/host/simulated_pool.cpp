#include "host/simulated_pool.h"

#include <algorithm>
#include <utility>

namespace pagedkv {

namespace {

Access tokens_of(const Region& r, std::int64_t block, std::int64_t first, std::int64_t count,
                 bool write) {
  return {r.base + block * r.block_stride + first * r.token_bytes,
          static_cast<std::size_t>(count * r.token_bytes), write};
}

}  // namespace

SimulatedPool::SimulatedPool(std::shared_ptr<SimulatedDevice> device, std::vector<Region> regions,
                             std::int32_t num_blocks, std::int32_t block_size)
    : device_(std::move(device)),
      memory_(std::make_shared<HostPool>(std::move(regions), num_blocks, block_size)) {}

void SimulatedPool::copy_blocks(std::span<const std::int32_t> copies) {
  memory_->check_copies(copies);
  std::vector<Access> accesses;
  for (const Region& r : memory_->regions()) {
    for (std::size_t i = 0; i < copies.size(); i += 3) {
      accesses.push_back(tokens_of(r, copies[i], 0, copies[i + 2], false));
      accesses.push_back(tokens_of(r, copies[i + 1], 0, copies[i + 2], true));
    }
  }
  queue(accesses, [memory = memory_, rows = std::vector(copies.begin(), copies.end())] {
    memory->copy_blocks(rows);
  });
}

void SimulatedPool::scatter(std::size_t region, std::span<const std::int64_t> slots,
                            const std::byte* source, std::int64_t source_stride) {
  memory_->check_slots(region, slots);
  const Region& r = memory_->regions()[region];
  std::vector<Access> accesses;
  std::vector<std::byte> values;  // the caller's memory is the caller's again
  for (std::size_t i = 0; i < slots.size(); ++i) {
    const std::int64_t block = slots[i] / memory_->block_size();
    accesses.push_back(tokens_of(r, block, slots[i] % memory_->block_size(), 1, true));
    const std::byte* token = source + static_cast<std::int64_t>(i) * source_stride;
    values.insert(values.end(), token, token + r.token_bytes);
  }
  queue(accesses, [memory = memory_, region, to = std::vector(slots.begin(), slots.end()),
                   values = std::move(values),
                   stride = r.token_bytes] { memory->scatter(region, to, values.data(), stride); });
}

void SimulatedPool::gather(std::size_t region, const TableView& table, std::int32_t first_block,
                           std::span<const std::int32_t> num_tokens, std::int32_t num_heads,
                           std::int32_t width, std::byte* target) {
  memory_->check_gather(region, table, first_block, num_tokens, num_heads, width);
  const Region& r = memory_->regions()[region];
  const std::int64_t size = memory_->block_size();
  std::vector<Access> accesses;
  for (std::int32_t b = 0; b < table.num_rows; ++b) {
    const std::int32_t* cells = table.cells + b * table.stride + first_block;
    for (std::int64_t at = 0; at < num_tokens[static_cast<std::size_t>(b)]; at += size, ++cells) {
      const std::int64_t left = num_tokens[static_cast<std::size_t>(b)] - at;
      accesses.push_back(tokens_of(r, *cells, 0, std::min(left, size), false));
    }
  }
  queue(accesses, [&, memory = memory_] {
    memory->gather(region, table, first_block, num_tokens, num_heads, width, target);
  });
  device_->synchronize(device_->compute_stream());
}

void SimulatedPool::queue(std::span<const Access> accesses, std::function<void()> work) {
  const Stream stream = device_->compute_stream();
  if (std::ranges::find(used_, stream) == used_.end()) used_.push_back(stream);
  device_->run(stream, accesses, std::move(work));
}

void SimulatedPool::synchronize() {
  if (!device_->is_open()) return;
  for (const Stream stream : used_) device_->synchronize(stream);
}

SimulatedPool::~SimulatedPool() { synchronize(); }

}  // namespace pagedkv
