#include "transfer/transfer_engine.h"

#include <algorithm>
#include <utility>

#include "core/check.h"

namespace pagedkv {

namespace {

std::string text(TransferId id) { return std::to_string(static_cast<std::int64_t>(id)); }

}  // namespace

TransferEngine::TransferEngine(std::shared_ptr<Device> device, std::vector<BlockRun> block_runs,
                               const EngineOptions& options)
    : device_(std::move(device)), device_runs_(std::move(block_runs)), options_(options) {
  std::int64_t block_bytes = 0;
  for (const BlockRun& run : device_runs_) block_bytes += run.block_bytes;
  const auto bytes =
      static_cast<std::size_t>((std::int64_t{options_.num_host_blocks} + 1) * block_bytes);
  out_ = device_->make_stream();
  in_ = device_->make_stream();
  host_ = device_->allocate_host(bytes);
  host_bytes_ = bytes;
  std::byte* base = host_;
  for (const BlockRun& run : device_runs_) {
    host_runs_.push_back({base, block_bytes, run.block_bytes});
    base += run.block_bytes;
  }
}

TransferEngine::~TransferEngine() {
  try {
    close();
  } catch (...) {  // copies may be under way, which the device waits for when it ends
  }
}

void TransferEngine::check_open() const {
  if (closed_) throw DeviceError("the transfer engine is closed");
}

const TransferEngine::Transfer* TransferEngine::find(TransferId id) const {
  const auto it = std::ranges::lower_bound(transfers_, id, {}, &Transfer::id);
  return it != transfers_.end() && it->id == id ? &*it : nullptr;
}

TransferEngine::Transfer* TransferEngine::find(TransferId id) {
  return const_cast<Transfer*>(static_cast<const TransferEngine&>(*this).find(id));
}

std::size_t TransferEngine::num_issued() const {
  return static_cast<std::size_t>(std::ranges::count_if(
      transfers_, [](const Transfer& t) { return t.state == State::issued; }));
}

// The caller's stream now. If it is another one than before, it continues the other one's work.
Stream TransferEngine::compute_stream() {
  const Stream now = device_->compute_stream();
  if (has_compute_ && now != compute_) {
    const Event before = device_->record(compute_);
    try {
      device_->fence(now, before, FenceSite::stream_after_stream);
    } catch (...) {
      device_->recycle(before);
      throw;
    }
    device_->recycle(before);
  }
  compute_ = now;
  has_compute_ = true;
  return now;
}

// ---------------------------------------------------------------------------------- submission

// The plan's copies as contiguous pieces of memory: neighbours on both sides become one.
std::vector<CopyRun> TransferEngine::runs_of(const TransferPlan& plan) const {
  const bool out = plan.target == Tier::host;
  const std::int32_t num_sources = out ? options_.num_device_blocks : options_.num_host_blocks;
  const std::int32_t num_targets = out ? options_.num_host_blocks : options_.num_device_blocks;
  std::vector<std::pair<std::int32_t, std::int32_t>> copies;
  copies.reserve(plan.copies.size());
  for (const BlockCopy& copy : plan.copies) {
    const std::int32_t source = index(copy.source);
    const std::int32_t target = index(copy.target);
    if (source < 1 || source > num_sources || target < 1 || target > num_targets) {
      throw InvalidSpec("transfer " + text(plan.id) + " names a block outside its tier");
    }
    copies.emplace_back(source, target);
  }
  std::ranges::sort(copies);
  std::vector<CopyRun> runs;
  for (std::size_t r = 0; r < device_runs_.size(); ++r) {
    const BlockRun& from = out ? device_runs_[r] : host_runs_[r];
    const BlockRun& to = out ? host_runs_[r] : device_runs_[r];
    const bool dense = from.block_stride == from.block_bytes && to.block_stride == to.block_bytes;
    for (std::size_t i = 0; i < copies.size();) {
      std::size_t n = 1;
      while (dense && i + n < copies.size() &&
             copies[i + n] ==
                 std::pair(copies[i + n - 1].first + 1, copies[i + n - 1].second + 1)) {
        ++n;
      }
      runs.push_back({to.base + copies[i].second * to.block_stride,
                      from.base + copies[i].first * from.block_stride,
                      n * static_cast<std::size_t>(from.block_bytes)});
      i += n;
    }
  }
  return runs;
}

void TransferEngine::submit(const TransferPlan& plan) {
  check_open();
  if (!transfers_.empty() && plan.id <= transfers_.back().id) {
    throw InvalidState("transfer " + text(plan.id) + " comes after transfer " +
                       text(transfers_.back().id) + ": submit plans in their order, once");
  }
  Transfer transfer{plan.id, plan.target, State::queued, plan.wait_for, runs_of(plan), {}, {},
                    {},      {}};
  transfers_.push_back(std::move(transfer));
  try {
    transfers_.back().behind = device_->record(compute_stream());
  } catch (const DeviceError& error) {  // it ends when those have that it waits for
    make_void(transfers_.back(), error.what());
  } catch (...) {
    transfers_.pop_back();
    throw;
  }
  issue_queued();
}

// Issues what is queued, as far as max_in_flight and the device let it.
void TransferEngine::issue_queued() {
  for (Transfer& transfer : transfers_) {
    if (transfer.state == State::issued || transfer.state == State::void_) continue;
    if (num_issued() >= static_cast<std::size_t>(options_.max_in_flight)) return;
    issue(transfer);
    if (transfer.state == State::copying) return;
  }
}

void TransferEngine::issue_up_to(TransferId id) {
  for (Transfer& transfer : transfers_) {
    if (transfer.id > id) return;
    if (transfer.state == State::queued || transfer.state == State::copying) issue(transfer);
    if (transfer.state != State::copying) continue;
    throw DeviceError("transfer " + text(transfer.id) +
                      " cannot be waited for: the device refuses an event");
  }
}

// A device that refuses makes the transfer fail; one that refuses the event after the copies leaves
// it `copying`, to be tried again, since nobody knows when they end. All before it are issued.
void TransferEngine::issue(Transfer& transfer) {
  const Stream stream = this->stream(transfer.target);
  if (transfer.state == State::queued) {
    try {
      device_->fence(stream, transfer.behind, FenceSite::transfer_after_compute);
      fence_behind(stream, transfer.wait_for, FenceSite::transfer_after_transfer);
      device_->prepare_memory(transfer.runs);
      transfer.begin = record_if_possible(stream);
      device_->copy(stream, transfer.runs);
    } catch (const DeviceError& error) {
      return make_void(transfer, error.what());
    }
    transfer.state = State::copying;
    num_runs_ += static_cast<std::int64_t>(transfer.runs.size());
    recycle(transfer.behind);
  }
  transfer.end = record_if_possible(stream);
  if (transfer.end == Event::none && transfer.begin != Event::none) {
    recycle(transfer.begin);  // its end matters more than its time
    transfer.end = record_if_possible(stream);
  }
  if (transfer.end != Event::none) transfer.state = State::issued;
}

Event TransferEngine::record_if_possible(Stream stream) {
  try {
    return device_->record(stream);
  } catch (const DeviceError&) {
    return Event::none;
  }
}

// The transfers in flight among `ids` and, for those without copies of their own, among what they
// wait for, each once, the latest first.
std::vector<const TransferEngine::Transfer*> TransferEngine::with_what_they_wait_for(
    std::span<const TransferId> ids) const {
  std::vector<TransferId> wanted(ids.begin(), ids.end());
  std::vector<const Transfer*> found;
  for (auto it = transfers_.rbegin(); it != transfers_.rend(); ++it) {
    // Whoever waits has a higher id than what it waits for.
    if (std::ranges::find(wanted, it->id) == wanted.end()) continue;
    found.push_back(&*it);
    if (it->state != State::void_) continue;
    for (const TransferId before : it->wait_for) {
      if (std::ranges::find(wanted, before) == wanted.end()) wanted.push_back(before);
    }
  }
  return found;
}

// Makes a stream wait for the ends of transfers. Of those on one stream the latest is enough.
void TransferEngine::fence_behind(Stream stream, std::span<const TransferId> ids, FenceSite site) {
  bool fenced[kNumTiers] = {};
  for (const Transfer* transfer : with_what_they_wait_for(ids)) {
    if (transfer->state == State::void_) continue;
    KV_CHECK(transfer->state == State::issued);
    bool& done = fenced[index(transfer->target)];
    if (done || this->stream(transfer->target) == stream) continue;
    device_->fence(stream, transfer->end, site);
    done = true;
  }
}

void TransferEngine::make_void(Transfer& transfer, const std::string& why) {
  transfer.state = State::void_;
  transfer.why = why;
  recycle(transfer.behind);
  recycle(transfer.begin);
  recycle(transfer.end);
}

void TransferEngine::recycle(Event& event) {
  const Event old = std::exchange(event, Event::none);
  if (old == Event::none) return;
  try {
    device_->recycle(old);
  } catch (const DeviceError&) {  // lost, and its events with it
  }
}

void TransferEngine::step(std::span<const TransferId> wait_for) {
  check_open();
  const Stream compute = compute_stream();
  for (const TransferId id : wait_for) issue_up_to(id);
  fence_behind(compute, wait_for, FenceSite::step_after_transfer);
}

void TransferEngine::follow() {
  check_open();
  compute_stream();
}

// -------------------------------------------------------------------------------------- ending

bool TransferEngine::has_ended(Transfer& transfer, Ended& ended) {
  const auto in_flight = [this](TransferId id) { return find(id) != nullptr; };
  if (std::ranges::any_of(transfer.wait_for, in_flight)) return false;
  ended = {transfer.id, true, transfer.why, 0};
  if (transfer.state == State::void_) return true;
  if (transfer.state != State::issued) return false;
  try {
    const Status status = device_->poll(transfer.end);
    if (status == Status::pending) return false;
    ended.failed = status == Status::failed;
    if (ended.failed) ended.why = device_->failure(transfer.end);
  } catch (const DeviceError& error) {
    if (device_->is_open()) return false;  // of the call alone: the copies may be under way
    ended = {transfer.id, true, error.what(), 0};
  }
  if (!ended.failed) ended.seconds = seconds_of(transfer);
  recycle(transfer.begin);
  recycle(transfer.end);
  return true;
}

// Of copies that have succeeded, whether or not their time can be told.
double TransferEngine::seconds_of(const Transfer& transfer) {
  if (transfer.begin == Event::none) return 0;
  try {
    return device_->seconds_between(transfer.begin, transfer.end);
  } catch (const DeviceError&) {
    return 0;
  }
}

std::vector<TransferEngine::Ended> TransferEngine::poll() {
  check_open();
  std::vector<Ended> all;
  for (auto it = transfers_.begin(); it != transfers_.end();) {
    Ended ended;
    if (has_ended(*it, ended)) {
      all.push_back(std::move(ended));
      it = transfers_.erase(it);
    } else {
      ++it;
    }
  }
  issue_queued();
  return all;
}

// The host waits: nowhere else, and in no step.
Status TransferEngine::await(Event event KV_SITE_PARAMETER) {
  KV_MUTABLE(Status::done);
  return device_->wait(event);
}

void TransferEngine::wait(TransferId id) {
  check_open();
  if (find(id) == nullptr) return;
  issue_up_to(id);
  for (const Transfer* transfer : with_what_they_wait_for({&id, 1})) {
    if (transfer->state == State::issued) await(transfer->end);
  }
}

bool TransferEngine::cancel(TransferId id) {
  check_open();
  Transfer* transfer = find(id);
  if (transfer == nullptr || transfer->state != State::queued) return false;
  make_void(*transfer, "cancelled");
  return true;
}

void TransferEngine::close() {
  if (closed_) return;
  const std::string why = "the transfer engine was closed";
  for (Transfer& transfer : transfers_) {
    if (transfer.state == State::queued) make_void(transfer, why);
  }
  for (Transfer& transfer : transfers_) {
    if (transfer.state == State::void_) continue;
    try {
      issue_up_to(transfer.id);
      await(transfer.end);
    } catch (const DeviceError&) {
      if (device_->is_open()) throw;  // it may be copied still
    }
    make_void(transfer, why);  // and its events are there for the next one
  }
  closed_ = true;
  transfers_.clear();
  device_->free_host(std::exchange(host_, nullptr), host_bytes_);
}

}  // namespace pagedkv
