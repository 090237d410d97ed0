#include "cuda/step_memory.h"

#include <algorithm>
#include <cstring>

namespace pagedkv {

namespace {

std::size_t table_bytes(const StepShape& shape) {
  return round_up(sizeof(std::int32_t) * static_cast<std::size_t>(shape.max_batch) *
                  static_cast<std::size_t>(shape.table_stride));
}

// Offsets behind the tables. A step of one token for each sequence, or fewer, has always the same.
struct Offsets {
  std::size_t query_starts = 0;
  std::size_t seq_lens;
  std::size_t copies;
  std::size_t input_ids;
  std::size_t slots;
  std::size_t positions;
  std::size_t end;

  Offsets(const StepShape& shape, std::int64_t num_tokens) {
    const auto batch = static_cast<std::size_t>(shape.max_batch);
    const auto tokens =
        static_cast<std::size_t>(std::max<std::int64_t>(num_tokens, shape.max_batch));
    seq_lens = round_up(sizeof(std::int32_t) * (batch + 1));
    copies = seq_lens + round_up(sizeof(std::int32_t) * batch);
    input_ids = copies + round_up(sizeof(BlockCopy) * batch);
    slots = input_ids + round_up(sizeof(std::int64_t) * tokens);
    positions = slots + round_up(sizeof(std::int64_t) * tokens);
    end = positions + round_up(sizeof(std::int64_t) * tokens);
  }
};

// Behind the largest step's arrays: one update for each row, and a cell for each token, which is
// more than tables change by, as long as rows keep their sequences.
std::size_t room_for_updates(const StepShape& shape) {
  return round_up(static_cast<std::size_t>(shape.max_batch) * sizeof(TableCells)) +
         round_up(static_cast<std::size_t>(shape.max_tokens) * sizeof(BlockId));
}

}  // namespace

std::size_t StepMemory::bytes(const StepShape& shape) {
  return table_bytes(shape) + Offsets(shape, shape.max_tokens).end + room_for_updates(shape);
}

StepMemory::StepMemory(std::shared_ptr<CudaDevice> device, const StepShape& shape,
                       std::byte* memory)
    : device_(std::move(device)),
      shape_(shape),
      memory_(memory),
      row_is_right_(static_cast<std::size_t>(shape.max_batch), 0),
      row_width_(static_cast<std::size_t>(shape.max_batch), 0) {}

void StepMemory::place(Array array, const void* host, std::byte* device, std::size_t bytes) {
  arrays_[static_cast<int>(array)] = {static_cast<const std::byte*>(host), device, bytes};
}

std::byte* StepMemory::address(Array array) const {
  return arrays_[static_cast<int>(array)].device;
}

void StepMemory::forget() { std::ranges::fill(row_is_right_, std::uint8_t{0}); }

// The cells that changed; of rows that the device does not have as the plan expects, all cells.
void StepMemory::list_updates(const StepPlan& plan) {
  updates_.clear();
  num_cells_ = 0;
  const auto add = [&](std::int32_t row, std::int32_t first, std::int32_t last) {
    updates_.push_back({row, first, last, static_cast<std::int32_t>(num_cells_)});
    num_cells_ += last - first;
  };
  for (const TableUpdate& update : plan.table_updates) {
    if (row_is_right_[static_cast<std::size_t>(update.row)]) {
      add(update.row, update.first, update.last);
    }
  }
  for (std::int32_t row = 0; row < plan.batch_size; ++row) {
    if (!row_is_right_[static_cast<std::size_t>(row)]) {
      add(row, 0, std::max(plan.table_width, row_width_[static_cast<std::size_t>(row)]));
    }
  }
  for (const TableCells& u : updates_) {
    std::int32_t& width = row_width_[static_cast<std::size_t>(u.row)];
    width = std::max(width, u.last);
  }
}

// A plan may come from a manager in another process, which may have been made with other sizes.
void StepMemory::check_shape(const StepPlan& plan) const {
  const auto fits = [this](const TableUpdate& update) {
    return update.last <= shape_.table_stride;
  };
  if (plan.batch_size <= shape_.max_batch && plan.table_width <= shape_.table_stride &&
      std::ranges::all_of(plan.table_updates, fits)) {
    return;
  }
  throw InvalidSpec(
      "the plan is larger than max_batch and max_model_len allow here: it is one of a manager that "
      "was made with others");
}

void StepMemory::upload(const StepPlan& plan) {
  check_shape(plan);
  if (plan.step != last_step_ + 1) forget();  // a plan came in between that went elsewhere
  last_step_ = plan.step;
  for (Placed& array : arrays_) array = {};
  list_updates(plan);
  try {
    const CudaDevice::Guard guard(*device_);
    UploadRing& ring = device_->ring();
    const std::size_t arrays = place_arrays(plan);
    const std::size_t updates = update_bytes();
    const bool together = table_bytes(shape_) + arrays + updates <= bytes(shape_);
    std::byte* const there = memory_ + table_bytes(shape_);
    ring.send(device_->stream(), there, arrays + (together ? updates : 0), [&](std::byte* host) {
      fill_arrays(plan, host, arrays);
      if (together) fill_updates(plan, host + arrays);
    });
    if (updates > 0 && together) update_tables(there + arrays);
    if (!together) {
      ring.upload(
          device_->stream(), updates, [&](std::byte* host) { fill_updates(plan, host); },
          [&](std::byte* up) { update_tables(up); });
    }
  } catch (...) {
    for (Placed& array : arrays_) array = {};
    forget();
    throw;
  }
  std::fill_n(row_is_right_.begin(), plan.batch_size, std::uint8_t{1});
}

// Where each array is going to be. Returns the bytes behind the tables that they take, padding too.
std::size_t StepMemory::place_arrays(const StepPlan& plan) {
  const bool with_tokens = plan.num_tokens <= shape_.max_tokens;
  const Offsets at(shape_, with_tokens ? plan.num_tokens : 0);
  const auto batch = static_cast<std::size_t>(plan.batch_size);
  const auto put = [&](Array array, const auto* from, std::size_t count, std::size_t offset) {
    place(array, from, memory_ + table_bytes(shape_) + offset, count * sizeof *from);
  };
  put(Array::query_starts, plan.query_starts, batch + 1, at.query_starts);
  put(Array::seq_lens, plan.seq_lens, batch, at.seq_lens);
  put(Array::copies, plan.copies.data(), plan.copies.size(), at.copies);
  if (with_tokens) {
    const auto tokens = static_cast<std::size_t>(plan.num_tokens);
    put(Array::slots, plan.slots, tokens, at.slots);
    put(Array::positions, plan.positions, tokens, at.positions);
    // Zeros where nobody gave any: a captured graph reads the same address.
    put(Array::input_ids, plan.input_ids, plan.has_tokens ? tokens : 0, at.input_ids);
  }
  place(Array::block_tables, nullptr, tables(), 0);  // which are updated where they are
  return with_tokens ? at.end : at.input_ids;
}

void StepMemory::fill_arrays(const StepPlan& plan, std::byte* host, std::size_t bytes) const {
  std::memset(host, 0, bytes);
  std::fill_n(reinterpret_cast<std::int32_t*>(host), shape_.max_batch + 1,  // query_starts
              static_cast<std::int32_t>(plan.num_tokens));
  for (const Placed& array : arrays_) {
    if (array.bytes == 0) continue;
    std::memcpy(host + (array.device - memory_) - table_bytes(shape_), array.host, array.bytes);
  }
}

std::size_t StepMemory::update_bytes() const {
  return round_up(updates_.size() * sizeof(TableCells)) +
         static_cast<std::size_t>(num_cells_) * sizeof(BlockId);
}

void StepMemory::fill_updates(const StepPlan& plan, std::byte* host) const {
  const std::size_t bytes = updates_.size() * sizeof(TableCells);
  if (bytes > 0) std::memcpy(host, updates_.data(), bytes);
  auto* cells = reinterpret_cast<BlockId*>(host + round_up(bytes));
  for (const TableCells& u : updates_) {
    const BlockId* row = plan.block_tables + std::int64_t{u.row} * plan.table_stride;
    const std::int32_t last = std::clamp(plan.table_width, u.first, u.last);
    BlockId* end = std::copy(row + u.first, row + last, cells + u.start);
    std::fill_n(end, u.last - last, BlockId::none);  // behind the widest row all is padding
  }
}

void StepMemory::update_tables(const std::byte* updates) {
  std::int64_t most = 0;
  for (const TableCells& u : updates_) most = std::max<std::int64_t>(most, u.last - u.first);
  const std::byte* const cells = updates + round_up(updates_.size() * sizeof(TableCells));
  const UpdateTables kernel = UpdateTables::make(
      reinterpret_cast<const TableCells*>(updates), static_cast<std::int64_t>(updates_.size()),
      most, reinterpret_cast<const std::int32_t*>(cells), reinterpret_cast<std::int32_t*>(tables()),
      shape_.table_stride);
  device_->check(device_->runtime().launch(kernel, device_->stream()), "update_tables");
}

}  // namespace pagedkv
