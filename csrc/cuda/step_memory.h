// A step's arrays on the GPU, at addresses that stay: what StepPlan says, for kernels and for the
// caller's tensors.
//
// All goes up in one copy: the arrays, the rows of `copies`, and the changes of the block tables,
// which a kernel then makes where the plan says. (Rows that go up whole may need a copy of their
// own.) Once a plan was not carried out, no row is trusted before it has gone up whole. Behind a
// step's arrays stands padding (slot 0, no tokens), for kernels that were captured for a larger
// step. A step of more tokens than `max_tokens` keeps its token arrays on the host, and says so.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/plan.h"
#include "cuda/cuda_device.h"
#include "cuda/kernels.h"

namespace pagedkv {

struct StepShape {
  std::int32_t max_batch;
  std::int64_t max_tokens;
  std::int32_t table_stride;
};

class StepMemory {
 public:
  enum class Array { input_ids, slots, positions, query_starts, seq_lens, block_tables, copies };

  // Bytes of device memory that such steps take. It begins zeroed.
  static std::size_t bytes(const StepShape& shape);

  StepMemory(std::shared_ptr<CudaDevice> device, const StepShape& shape, std::byte* memory);

  // Queues the plan's arrays on the caller's stream. The last one's are gone then.
  void upload(const StepPlan& plan);

  // Where an array of the last plan is on the device; null if it has stayed on the host.
  std::byte* address(Array array) const;

 private:
  struct Placed {  // an array of the last plan
    const std::byte* host = nullptr;
    std::byte* device = nullptr;
    std::size_t bytes = 0;
  };

  void check_shape(const StepPlan& plan) const;
  void forget();  // what the tables on the device have
  std::byte* tables() const { return memory_; }
  void place(Array array, const void* host, std::byte* device, std::size_t bytes);
  void list_updates(const StepPlan& plan);
  std::size_t place_arrays(const StepPlan& plan);
  void fill_arrays(const StepPlan& plan, std::byte* host, std::size_t bytes) const;
  std::size_t update_bytes() const;
  void fill_updates(const StepPlan& plan, std::byte* host) const;
  void update_tables(const std::byte* updates);

  const std::shared_ptr<CudaDevice> device_;
  const StepShape shape_;
  std::byte* const memory_;
  Placed arrays_[7];
  std::int64_t last_step_ = 0;
  std::vector<std::uint8_t> row_is_right_;
  std::vector<std::int32_t> row_width_;  // cells of each row that were ever written; zeros behind
  std::vector<TableCells> updates_;
  std::int64_t num_cells_ = 0;
};

}  // namespace pagedkv
