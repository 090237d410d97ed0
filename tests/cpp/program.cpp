#include "program.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/check.h"
#include "world.h"

namespace pagedkv {

namespace {

class Program : World {
 public:
  explicit Program(const ProgramOptions& options) : World(options) {}

  void run() {
    for (int i = 0; i < options_.num_commands; ++i) {
      command();
      if (below(4) == 0) manager_->verify();
    }
    finish();
  }

 private:
  void command() {
    switch (below(27)) {
      case 0:
      case 1: return create();
      case 2: return fork();
      case 3: return reorder();
      case 4: return truncate();
      case 5: return release(some(2));
      case 6:
      case 7: return swap("swap out", some(2), &BlockManager::swap_out);
      case 8:
      case 9: return swap("swap in", some(2), &BlockManager::swap_in);
      case 10:
        for (const SequenceId id : some(1)) fetch(id);
        return;
      case 11: return chance(2) ? drop() : restore();
      case 12: return poll();
      case 13: return wait();
      case 14: return fault();
      case 15: return read(some(3));
      case 16: return leave_behind();
      case 17:
      case 18: return revisit();
      case 19: return flood();
      case 20: return join();
      default: return step(some(3), 1 + below(4));
    }
  }

  void create() {
    Text text;
    text.root = static_cast<Digest>(1 + below(2));
    const Token first = below(2);
    for (int n = 1 + below(12); n > 0; --n) text.rest.push_back(chance(6) ? below(3) : first);
    SequenceId id{};
    if (!attempt("create", [&] { id = manager_->create(text.rest, salt_of(text)); })) return;
    take_hit(id, text);
    texts_[id] = text;
  }

  // Something of its own that nobody finds, sometimes as much as there is room for.
  void flood() {
    const SequenceId id = manager_->create_anonymous();
    texts_[id].root = 1000 + ++num_anonymous_;
    const int room =
        static_cast<int>(manager_->stats().device.num_free + manager_->stats().device.num_cached);
    step({id}, chance(2) ? std::max(1, room * static_cast<int>(config_.block_size)) : 3);
    if (chance(2)) release({id});
  }

  // A prompt that was there before: perhaps only the host still has it.
  void revisit() {
    if (past_.empty()) return;
    Text text = past_[static_cast<std::size_t>(below(static_cast<int>(past_.size())))];
    text.rest = text.tokens;
    text.cut(0);
    text.rest.push_back(below(2));
    SequenceId id{};
    if (!attempt("revisit", [&] { id = manager_->create(text.rest, salt_of(text)); })) return;
    take_hit(id, text);
    texts_[id] = text;
    fetch(id);
  }

  // A fork goes to the host and ends there, while its copies may not have begun; the other goes on
  // in the block that they read.
  void leave_behind() {
    for (const SequenceId id : some(1)) {
      std::vector<SequenceId> ids;
      if (!attempt("fork", [&] { ids = manager_->fork(id, 2); })) return;
      texts_[ids[1]] = Text(texts_.at(id));
      TransferPlan plan;
      if (attempt("swap out", [&] { plan = manager_->swap_out({{ids[1]}}); })) submit(plan);
      release({ids[1]});
      step({id}, 1);
    }
  }

  // Two that share a path come back one after the other: the second waits for what the first
  // brings.
  void join() {
    for (const SequenceId id : some(1)) {
      std::vector<SequenceId> ids;
      if (manager_->tier(id) != Tier::host) swap("swap out", {id}, &BlockManager::swap_out);
      if (!attempt("fork", [&] { ids = manager_->fork(id, 2); })) return;
      texts_[ids[1]] = Text(texts_.at(id));
      if (chance(2)) device_->hold_next();
      swap("swap in", {ids[0]}, &BlockManager::swap_in);
      swap("swap in", {ids[1]}, &BlockManager::swap_in);
      poll();
    }
  }

  void fork() {
    for (const SequenceId id : some(1)) {
      const std::int64_t n = 1 + below(3);
      std::vector<SequenceId> ids;
      if (!attempt("fork", [&] { ids = manager_->fork(id, n); })) continue;
      for (const SequenceId child : ids) texts_[child] = Text(texts_.at(id));
    }
  }

  void reorder() {
    const std::vector<SequenceId> ids = some(4);
    std::vector<std::int64_t> parents;
    for (std::size_t i = 0; i < ids.size(); ++i)
      parents.push_back(below(static_cast<int>(ids.size())));
    if (!attempt("reorder", [&] { manager_->reorder(ids, parents); })) return;
    std::vector<Text> texts;
    for (const std::int64_t p : parents)
      texts.push_back(texts_.at(ids[static_cast<std::size_t>(p)]));
    for (std::size_t i = 0; i < ids.size(); ++i) texts_[ids[i]] = texts[i];
  }

  void truncate() {
    const std::vector<SequenceId> ids = some(2);
    std::vector<std::int64_t> lengths;
    for (const SequenceId id : ids)
      lengths.push_back(below(static_cast<int>(texts_.at(id).tokens.size()) + 1));
    if (!attempt("truncate", [&] { manager_->truncate(ids, lengths); })) return;
    for (std::size_t i = 0; i < ids.size(); ++i)
      texts_.at(ids[i]).cut(static_cast<std::size_t>(lengths[i]));
  }

  template <class F>
  void swap(const char* name, const std::vector<SequenceId>& ids, F move) {
    TransferPlan plan;
    if (attempt(name, [&] { plan = ((*manager_).*move)(ids); })) submit(plan);
  }

  void drop() {
    const std::vector<SequenceId> ids = some(2);
    if (!attempt("drop", [&] { manager_->drop(ids); })) return;
    for (const SequenceId id : ids) forget(id);
  }

  void restore() {
    std::vector<SequenceId> ids;
    for (const auto& [id, text] : texts_) {
      if (text.dropped) ids.push_back(id);
    }
    if (ids.empty() || !attempt("restore", [&] { manager_->restore(ids); })) return;
    for (const SequenceId id : ids) {
      texts_.at(id).dropped = false;
      take_hit(id, texts_.at(id));
    }
  }

  void wait() {
    const std::vector<SequenceId> ids = some(1);
    if (ids.empty()) return;
    const TransferId transfer = manager_->waits_for(ids[0]);
    if (transfer == TransferId::none) return;
    say("wait");
    if (chance(4) && engine_->cancel(transfer)) say("cancelled");
    engine_->wait(transfer);
    poll();
    expect(!engine_->in_flight(transfer), "a transfer that was waited for has ended");
  }

  void fault() {
    if (chance(3) && !gpu_) {
      say("a copy will fail");
      device_->fail_copy(1 + below(2));
      may_fail_ = true;
    } else if (chance(2)) {
      use_stream(below(2));
      say("other stream");
    } else {
      device_->hold_next();
    }
  }

  void finish() {
    say("finish");
    if (chance(4)) {  // in the middle of everything
      engine_->close();
      close_device();
      return check_device();
    }
    while (engine_->num_in_flight() > 0) poll();
    manager_->verify();
    expect(manager_->stats().num_transfers == 0, "no transfer is left");
    restore();
    for (const SequenceId id : all()) bring_back(id);
    read(all());
    release(all());
    manager_->verify();
    const Stats stats = manager_->stats();
    expect(stats.device.num_active == 0 && stats.host.num_active == 0, "nothing is held");
    engine_->close();
    if (gpu_) gpu_->close();
    expect(device_->num_events() == 0, "every event was recycled");
    expect(device_->host_bytes() == 0, "the host tier was given back");
    close_device();
    check_device();
  }

  // Swaps a sequence in, if there is room, so that what the host held of it is looked at too.
  void bring_back(SequenceId id) {
    if (manager_->tier(id) == Tier::device) return;
    TransferPlan plan;
    if (!attempt("bring back", [&] { plan = manager_->swap_in({{id}}); })) return;
    submit(plan);
    engine_->wait(plan.id);
    poll();
    read({id});
    release({id});
  }
};

}  // namespace

std::string run_program(const ProgramOptions& options) {
  try {
    Program(options).run();
  } catch (const BrokenInvariant& error) {
    return std::string("broken invariant: ") + error.what();
  } catch (const Wrong& wrong) {
    return wrong.what();
  } catch (const std::exception& error) {
    return std::string("unexpected error: ") + error.what();
  }
  return "";
}

}  // namespace pagedkv
