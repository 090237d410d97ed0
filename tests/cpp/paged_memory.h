// The device tier of a random program: K and V as digests of each token's history.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "core/plan.h"
#include "host/simulated_device.h"
#include "transfer/transfer_engine.h"

namespace pagedkv {

using Digest = std::uint64_t;

// A sequence as its owner knows it: digests[i] stands for K and V of tokens 0 .. i.
struct Text {
  std::vector<Token> tokens;
  std::vector<Digest> digests;
  std::vector<Token> rest;  // of its prompt
  Digest root = 1;
  bool dropped = false;

  void grow(Token token) {
    const Digest last = digests.empty() ? root : digests.back();
    tokens.push_back(token);
    digests.push_back((last ^ static_cast<Digest>(token + 1)) * 0x9e3779b97f4a7c15u + 1);
  }
  void cut(std::size_t length) {
    tokens.resize(std::min(tokens.size(), length));
    digests.resize(tokens.size());
  }
};

// Two regions, keys and values, whose work is queued on the device's compute stream. One is dense,
// so that neighbouring blocks are copied as one; the other has gaps.
class PagedMemory {
 public:
  PagedMemory(std::shared_ptr<SimulatedDevice> device, std::int64_t num_blocks,
              std::int64_t block_size);

  std::vector<BlockRun> block_runs();
  // Queues what a plan says: its copies, then its writes. Row i belongs to texts[i].
  void carry_out(const StepPlan& plan, std::span<const Text* const> texts);
  // Queues a look at all that a sequence with this block table holds.
  void look(const Text& text, std::span<const BlockId> table);
  int num_wrong() const { return num_wrong_; }  // digests that a look did not expect

 private:
  static constexpr int kNumRegions = 2;

  std::byte* at(int region, std::int64_t slot);
  static Digest mixed(Digest digest, int region) {
    return digest + static_cast<Digest>(region) * 0x5555;
  }

  std::shared_ptr<SimulatedDevice> device_;
  std::int64_t block_size_;
  std::vector<Digest> pools_[kNumRegions];
  std::int64_t strides_[kNumRegions];  // in digests, from block to block
  int num_wrong_ = 0;
};

}  // namespace pagedkv
