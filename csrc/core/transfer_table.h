// The transfers in flight, and what each block has to do with them.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "core/mutant.h"
#include "core/types.h"

namespace pagedkv {

// Transfers hold no references: blocks that one of them still touches are given out at once, and
// whoever takes one waits for the last transfer that touched it. That is enough, since a transfer
// waits in its turn for the last one before it on each of its blocks.
class TransferTable {
 public:
  struct Landing {
    NodeId node;
    BlockId block;
  };
  struct Transfer {
    TransferId id;
    Tier target;
    std::vector<Landing> landings;       // what it writes
    std::vector<TransferId> wait_for;    // it may not begin before these have ended
    std::vector<TransferId> depends_on;  // of these, those whose landings it needs
    bool is_void = false;                // one of those failed: it ends, and nothing comes of it
  };

  TransferTable(std::int32_t num_device_blocks, std::int32_t num_host_blocks);

  bool idle() const { return in_flight_.empty(); }
  bool in_flight(TransferId id) const { return id != TransferId::none && find(id) != nullptr; }
  const std::vector<Transfer>& transfers() const { return in_flight_; }  // by ascending id
  std::vector<Transfer>& transfers() { return in_flight_; }
  std::size_t bytes() const;

  // With the next id, unless it throws, and with memory for all that is going to be added to it.
  // Valid until the next open() or close().
  Transfer& open(Tier target, std::size_t num_landings);
  void close(TransferId id);
  Transfer* find(TransferId id);
  const Transfer* find(TransferId id) const;

  // The transfer in flight that writes this block, which till then has no content; or none.
  TransferId landing(Tier tier, BlockId block) const {
    return idle() ? TransferId::none : use(tier, block).writer;
  }
  void land(Tier tier, BlockId block KV_SITE);

  // Adds what must have ended before `block` may be used anew.
  void wait_for(Tier tier, BlockId block, std::vector<TransferId>& transfers KV_SITE) const;
  // `block` goes to somebody new, who writes it: nothing lands there any more.
  void claim(Tier tier, BlockId block, std::vector<TransferId>& transfers KV_SITE);
  // `transfer` reads or writes `block`.
  void read(Transfer& transfer, Tier tier, BlockId block KV_SITE);
  void write(Transfer& transfer, NodeId node, BlockId block KV_SITE);

  static void add(std::vector<TransferId>& transfers, TransferId id KV_SITE);

 private:
  struct Use {
    TransferId last = TransferId::none;
    TransferId writer = TransferId::none;  // none once it has ended
  };
  Use& use(Tier tier, BlockId block) {
    return uses_[index(tier)][static_cast<std::size_t>(index(block))];
  }
  const Use& use(Tier tier, BlockId block) const {
    return uses_[index(tier)][static_cast<std::size_t>(index(block))];
  }

  std::array<std::vector<Use>, kNumTiers> uses_;  // empty where there is no host tier
  std::vector<Transfer> in_flight_;
  TransferId last_{0};
};

}  // namespace pagedkv
