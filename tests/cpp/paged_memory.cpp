#include "paged_memory.h"

#include <cstring>
#include <utility>

namespace pagedkv {

PagedMemory::PagedMemory(std::shared_ptr<SimulatedDevice> device, std::int64_t num_blocks,
                         std::int64_t block_size)
    : device_(std::move(device)), block_size_(block_size), strides_{block_size, 2 * block_size} {
  for (int r = 0; r < kNumRegions; ++r) {
    pools_[r].resize(static_cast<std::size_t>((num_blocks + 1) * strides_[r]));
  }
}

std::vector<BlockRun> PagedMemory::block_runs() {
  constexpr std::int64_t size = sizeof(Digest);
  std::vector<BlockRun> all;
  for (int r = 0; r < kNumRegions; ++r)
    all.push_back({at(r, 0), strides_[r] * size, block_size_ * size});
  return all;
}

std::byte* PagedMemory::at(int region, std::int64_t slot) {
  const std::int64_t i = slot / block_size_ * strides_[region] + slot % block_size_;
  return reinterpret_cast<std::byte*>(pools_[region].data() + i);
}

void PagedMemory::carry_out(const StepPlan& plan, std::span<const Text* const> texts) {
  struct Move {
    std::byte* to;
    const std::byte* from;
    std::size_t bytes;
  };
  std::vector<Access> accesses;
  std::vector<Move> moves;
  for (const BlockCopy& copy : plan.copies) {
    for (int r = 0; r < kNumRegions; ++r) {
      const Move move{at(r, index(copy.target) * block_size_),
                      at(r, index(copy.source) * block_size_),
                      static_cast<std::size_t>(copy.num_tokens) * sizeof(Digest)};
      accesses.push_back({move.from, move.bytes, false});
      accesses.push_back({move.to, move.bytes, true});
      moves.push_back(move);
    }
  }
  const Stream stream = device_->compute_stream();
  if (!moves.empty()) {
    device_->run(stream, accesses, [moves] {
      for (const Move& move : moves) std::memcpy(move.to, move.from, move.bytes);
    });
  }
  std::vector<std::pair<std::byte*, Digest>> writes;
  accesses.clear();
  for (std::size_t row = 0; row < texts.size(); ++row) {
    for (std::int32_t t = plan.query_starts[row]; t < plan.query_starts[row + 1]; ++t) {
      const Digest digest = texts[row]->digests[static_cast<std::size_t>(plan.positions[t])];
      for (int r = 0; r < kNumRegions; ++r) {
        std::byte* const to = at(r, plan.slots[t]);
        accesses.push_back({to, sizeof(Digest), true});
        writes.emplace_back(to, mixed(digest, r));
      }
    }
  }
  device_->run(stream, accesses, [writes] {
    for (const auto& [to, digest] : writes) std::memcpy(to, &digest, sizeof digest);
  });
}

void PagedMemory::look(const Text& text, std::span<const BlockId> table) {
  std::vector<Access> accesses;
  std::vector<std::pair<const std::byte*, Digest>> looks;
  for (std::size_t i = 0; i < text.tokens.size(); ++i) {
    const auto size = static_cast<std::size_t>(block_size_);
    const std::int64_t slot =
        index(table[i / size]) * block_size_ + static_cast<std::int64_t>(i % size);
    for (int r = 0; r < kNumRegions; ++r) {
      accesses.push_back({at(r, slot), sizeof(Digest), false});
      looks.emplace_back(at(r, slot), mixed(text.digests[i], r));
    }
  }
  device_->run(device_->compute_stream(), accesses, [looks, this] {
    for (const auto& [from, digest] : looks) {
      Digest found;
      std::memcpy(&found, from, sizeof found);
      num_wrong_ += found != digest;
    }
  });
}

}  // namespace pagedkv
