#include "core/transfer_table.h"

#include <algorithm>
#include <utility>

#include "core/check.h"

namespace pagedkv {

TransferTable::TransferTable(std::int32_t num_device_blocks, std::int32_t num_host_blocks) {
  if (num_host_blocks == 0) return;
  uses_[index(Tier::device)].resize(static_cast<std::size_t>(num_device_blocks) + 1);
  uses_[index(Tier::host)].resize(static_cast<std::size_t>(num_host_blocks) + 1);
}

std::size_t TransferTable::bytes() const {
  return (uses_[0].capacity() + uses_[1].capacity()) * sizeof(Use);
}

const TransferTable::Transfer* TransferTable::find(TransferId id) const {
  const auto it = std::ranges::lower_bound(in_flight_, id, {}, &Transfer::id);
  return it != in_flight_.end() && it->id == id ? &*it : nullptr;
}

TransferTable::Transfer* TransferTable::find(TransferId id) {
  return const_cast<Transfer*>(static_cast<const TransferTable&>(*this).find(id));
}

TransferTable::Transfer& TransferTable::open(Tier target, std::size_t num_landings) {
  Transfer transfer{TransferId{static_cast<std::int64_t>(last_) + 1}, target, {}, {}, {}};
  transfer.landings.reserve(num_landings);
  transfer.wait_for.reserve(in_flight_.size());
  transfer.depends_on.reserve(in_flight_.size());
  in_flight_.push_back(std::move(transfer));
  last_ = in_flight_.back().id;
  return in_flight_.back();
}

void TransferTable::close(TransferId id) {
  Transfer* transfer = find(id);
  KV_CHECK(transfer != nullptr);
  for (const Landing& landing : transfer->landings) {
    if (use(transfer->target, landing.block).writer == id) land(transfer->target, landing.block);
  }
  in_flight_.erase(in_flight_.begin() + (transfer - in_flight_.data()));
}

void TransferTable::land(Tier tier, BlockId block KV_SITE_PARAMETER) {
  KV_MUTABLE();
  use(tier, block).writer = TransferId::none;
}

void TransferTable::add(std::vector<TransferId>& transfers, TransferId id KV_SITE_PARAMETER) {
  KV_MUTABLE();
  if (!transfers.empty() && transfers.back() == id) return;
  if (std::find(transfers.begin(), transfers.end(), id) == transfers.end()) transfers.push_back(id);
}

void TransferTable::wait_for(Tier tier, BlockId block,
                             std::vector<TransferId>& transfers KV_SITE_PARAMETER) const {
  KV_MUTABLE();
  if (idle()) return;
  const TransferId last = use(tier, block).last;
  if (in_flight(last)) add(transfers, last);
}

void TransferTable::claim(Tier tier, BlockId block,
                          std::vector<TransferId>& transfers KV_SITE_PARAMETER) {
  KV_MUTABLE();
  if (idle()) return;
  wait_for(tier, block, transfers);
  land(tier, block);
}

void TransferTable::read(Transfer& transfer, Tier tier, BlockId block KV_SITE_PARAMETER) {
  KV_MUTABLE();
  Use& use = this->use(tier, block);
  wait_for(tier, block, transfer.wait_for);
  if (use.writer != TransferId::none) add(transfer.depends_on, use.writer);
  use.last = transfer.id;
}

void TransferTable::write(Transfer& transfer, NodeId node, BlockId block KV_SITE_PARAMETER) {
  KV_MUTABLE();
  Use& use = this->use(transfer.target, block);
  wait_for(transfer.target, block, transfer.wait_for);
  use.last = use.writer = transfer.id;
  transfer.landings.push_back({node, block});
}

}  // namespace pagedkv
