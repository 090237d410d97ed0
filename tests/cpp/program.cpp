#include "program.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <stdexcept>
#include <vector>

#include "core/block_manager.h"
#include "core/check.h"
#include "host/simulated_device.h"
#include "transfer/transfer_engine.h"

namespace pagedkv {

namespace {

using Digest = std::uint64_t;
constexpr int kNumRegions = 2;  // keys and values

struct Wrong : std::runtime_error {
  using std::runtime_error::runtime_error;
};

void expect(bool holds, const std::string& what) {
  if (!holds) throw Wrong(what);
}

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

class Program {
 public:
  explicit Program(const ProgramOptions& options)
      : options_(options), random_(options.seed * 2 + 1) {
    config_.block_size = 1 + below(3);
    config_.num_device_blocks = 4 + below(12);
    config_.num_host_blocks = 1 + below(12);
    config_.max_batch = 4;
    config_.max_model_len = 30;
    manager_ = std::make_unique<BlockManager>(config_);
    SimulatedOptions simulated;
    simulated.schedule = below(3) == 0 ? Schedule::lazy : Schedule::random;
    simulated.seed = options.seed;
    simulated.num_compute_streams = 2;
    simulated.granule_bytes = sizeof(Digest);
    device_ = std::make_shared<SimulatedDevice>(simulated);
    if (options.skip) device_->skip(*options.skip);
    block_bytes_ = config_.block_size * static_cast<std::int64_t>(sizeof(Digest));
    // One pool is dense, so that neighbouring blocks are copied as one; the other has gaps.
    std::vector<BlockRegion> regions;
    for (int r = 0; r < kNumRegions; ++r) {
      const std::int64_t stride = r == 0 ? block_bytes_ : 2 * block_bytes_;
      pools_[r].resize(static_cast<std::size_t>((config_.num_device_blocks + 1) * stride) /
                       sizeof(Digest));
      strides_[r] = stride;
      regions.push_back({reinterpret_cast<std::byte*>(pools_[r].data()), stride, block_bytes_});
    }
    EngineOptions engine;
    engine.num_device_blocks = static_cast<std::int32_t>(config_.num_device_blocks);
    engine.num_host_blocks = static_cast<std::int32_t>(config_.num_host_blocks);
    engine.max_in_flight = 1 + below(4);
    engine_ = std::make_unique<TransferEngine>(device_, regions, engine);
  }

  void run() {
    for (int i = 0; i < options_.num_commands; ++i) {
      command();
      if (below(4) == 0) manager_->verify();
    }
    finish();
  }

 private:
  int below(int n) { return static_cast<int>(random_() % static_cast<std::uint64_t>(n)); }
  bool chance(int n) { return below(n) == 0; }

  void say(const std::string& what) const {
    if (options_.trace) std::printf("  %s\n", what.c_str());
  }

  // ---- commands. An Error that the state may bring leaves everything as it was.

  template <class F>
  bool attempt(const char* name, F&& call) {
    try {
      call();
      say(name);
      return true;
    } catch (const OutOfBlocks&) {
    } catch (const NotResident&) {
    } catch (const InvalidState&) {
    }
    say(std::string(name) + " refused");
    return false;
  }

  void command() {
    switch (below(25)) {
      case 0:
      case 1: return create();
      case 2: return fork();
      case 3: return reorder();
      case 4: return truncate();
      case 5: return release(some(2));
      case 6:
      case 7: return swap("swap out", &BlockManager::swap_out);
      case 8:
      case 9: return swap("swap in", &BlockManager::swap_in);
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
      default: return step(some(3), 1 + below(4));
    }
  }

  std::vector<SequenceId> all() const {
    std::vector<SequenceId> ids;
    for (const auto& [id, text] : texts_) ids.push_back(id);
    return ids;
  }

  std::vector<SequenceId> some(int most) {
    std::vector<SequenceId> ids = all();
    std::ranges::shuffle(ids, random_);
    ids.resize(std::min(ids.size(), static_cast<std::size_t>(1 + below(most))));
    return ids;
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
      std::vector<SequenceId> ids(2);
      if (!attempt("fork", [&] { manager_->fork(id, ids); })) return;
      texts_[ids[1]] = Text(texts_.at(id));
      TransferPlan plan;
      if (attempt("swap out", [&] { plan = manager_->swap_out({{ids[1]}}); })) submit(plan);
      release({ids[1]});
      step({id}, 1);
    }
  }

  // What the manager says the sequence holds of `rest` becomes its text.
  void take_hit(SequenceId id, Text& text) {
    const auto held = static_cast<std::size_t>(manager_->length(id));
    expect(held >= text.tokens.size() && held <= text.tokens.size() + text.rest.size(),
           "hit length");
    while (text.tokens.size() < held) {
      text.grow(text.rest.front());
      text.rest.erase(text.rest.begin());
    }
  }

  void fork() {
    for (const SequenceId id : some(1)) {
      std::vector<SequenceId> ids(static_cast<std::size_t>(1 + below(3)));
      if (!attempt("fork", [&] { manager_->fork(id, ids); })) continue;
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

  void release(const std::vector<SequenceId>& ids) {
    if (!attempt("release", [&] { manager_->release(ids); })) return;
    for (const SequenceId id : ids) {
      if (texts_.at(id).root < 1000) past_.push_back(texts_.at(id));
      texts_.erase(id);
    }
  }

  template <class F>
  void swap(const char* name, F move) {
    const std::vector<SequenceId> ids = some(2);
    TransferPlan plan;
    if (attempt(name, [&] { plan = ((*manager_).*move)(ids); })) submit(plan);
  }

  void fetch(SequenceId id) {
    TransferPlan plan;
    if (!attempt("fetch", [&] { plan = manager_->fetch(id); })) return;
    take_hit(id, texts_.at(id));
    submit(plan);
  }

  void submit(const TransferPlan& plan) {
    try {
      engine_->submit(plan);
    } catch (const DeviceError&) {
      end({plan.id, true, "refused"});
    }
  }

  void drop() {
    const std::vector<SequenceId> ids = some(2);
    if (!attempt("drop", [&] { manager_->drop(ids); })) return;
    for (const SequenceId id : ids) forget(id);
  }

  void forget(SequenceId id) {
    Text& text = texts_.at(id);
    text.rest.insert(text.rest.begin(), text.tokens.begin(), text.tokens.end());
    text.cut(0);
    text.dropped = true;
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

  // ---- ends

  void poll() {
    say("poll");
    for (const TransferEngine::Ended& ended : engine_->poll()) {
      end(ended);
      manager_->verify();
    }
  }

  void end(const TransferEngine::Ended& ended) {
    if (!ended.failed) return manager_->complete(ended.id);
    expect(may_fail_ || ended.why == "cancelled", "a transfer failed: " + ended.why);
    say("aborted");
    for (const SequenceId id : manager_->abort(ended.id).sequences) forget(id);
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
    if (chance(3)) {
      say("a copy will fail");
      device_->fail_copy(1 + below(2));
      may_fail_ = true;
    } else if (chance(2)) {
      device_->use_compute_stream(below(2));
      say("other stream");
    } else {
      device_->hold_next();
    }
  }

  // ---- steps

  void step(const std::vector<SequenceId>& ids, int most) {
    std::vector<std::int64_t> counts;
    std::vector<Token> tokens;
    for (const SequenceId id : ids) {
      const Text& text = texts_.at(id);
      const int n = most > 4 ? most : 1 + below(most);
      counts.push_back(n);
      for (int i = 0; i < n; ++i) {
        const auto at = static_cast<std::size_t>(i);
        tokens.push_back(at < text.rest.size() ? text.rest[at] : below(2));
      }
    }
    const StepPlan* plan = nullptr;
    if (!attempt("step", [&] {
          try {
            plan = &manager_->append(ids, tokens, true, counts);
          } catch (const InvalidSpec&) {  // past max_model_len
            throw InvalidState("");
          }
        })) {
      return;
    }
    engine_->step(plan->wait_for);
    std::size_t at = 0;
    std::vector<Text> before;
    for (std::size_t i = 0; i < ids.size(); ++i) {
      Text& text = texts_.at(ids[i]);
      before.push_back(text);
      for (std::int64_t n = counts[i]; n > 0; --n, ++at) {
        if (!text.rest.empty()) text.rest.erase(text.rest.begin());
        text.grow(tokens[at]);
      }
    }
    if (chance(8)) {
      manager_->rollback(plan->step);
      for (std::size_t i = 0; i < ids.size(); ++i) texts_.at(ids[i]) = before[i];
      return;
    }
    carry_out(*plan, ids);
    may_be_private_ |= manager_->stats().num_transfers > 0;
    manager_->commit(plan->step, {}, false);
    check_published(ids);
    read(ids);
  }

  // Every full block is a hit, but where a commit met the same content on its way here.
  void check_published(const std::vector<SequenceId>& ids) {
    for (const SequenceId id : may_be_private_ ? std::vector<SequenceId>{} : ids) {
      const Text& text = texts_.at(id);
      if (text.root >= 1000) continue;
      std::vector<Token> tokens = text.tokens;
      tokens.push_back(0);
      const PrefixHit hit = manager_->lookup(tokens, salt_of(text));
      expect(
          hit.num_full_blocks == static_cast<std::int32_t>(text.tokens.size()) / config_.block_size,
          "a committed full block is a hit");
    }
  }

  static std::string salt_of(const Text& text) { return text.root == 1 ? "" : "b"; }

  std::byte* slot(int region, std::int64_t slot) {
    const std::int64_t block = slot / config_.block_size;
    const std::int64_t offset = slot % config_.block_size;
    return reinterpret_cast<std::byte*>(pools_[region].data()) + block * strides_[region] +
           offset * static_cast<std::int64_t>(sizeof(Digest));
  }

  static Digest mixed(Digest digest, int region) {
    return digest + static_cast<Digest>(region) * 0x5555;
  }

  // Queues what a plan says: its copies, then its writes.
  void carry_out(const StepPlan& plan, const std::vector<SequenceId>& ids) {
    struct Move {
      std::byte* to;
      const std::byte* from;
      std::size_t bytes;
    };
    std::vector<Access> accesses;
    std::vector<Move> moves;
    for (const BlockCopy& copy : plan.copies) {
      for (int r = 0; r < kNumRegions; ++r) {
        const Move move{slot(r, index(copy.target) * config_.block_size),
                        slot(r, index(copy.source) * config_.block_size),
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
    struct Write {
      std::byte* at;
      Digest digest;
    };
    std::vector<Write> writes;
    accesses.clear();
    for (std::size_t row = 0; row < ids.size(); ++row) {
      const Text& text = texts_.at(ids[row]);
      for (std::int32_t t = plan.query_starts[row]; t < plan.query_starts[row + 1]; ++t) {
        const Digest digest = text.digests[static_cast<std::size_t>(plan.positions[t])];
        for (int r = 0; r < kNumRegions; ++r) {
          std::byte* at = slot(r, plan.slots[t]);
          accesses.push_back({at, sizeof(Digest), true});
          writes.push_back({at, mixed(digest, r)});
        }
      }
    }
    device_->run(stream, accesses, [writes] {
      for (const Write& write : writes) std::memcpy(write.at, &write.digest, sizeof(Digest));
    });
  }

  // Queues a look at all that the resident ones of `ids` hold.
  void read(const std::vector<SequenceId>& ids) {
    struct Look {
      const std::byte* at;
      Digest digest;
    };
    std::vector<Access> accesses;
    std::vector<Look> looks;
    for (const SequenceId id : ids) {
      const Text& text = texts_.at(id);
      expect(manager_->length(id) == static_cast<std::int64_t>(text.tokens.size()), "length");
      if (text.dropped || manager_->tier(id) != Tier::device ||
          manager_->waits_for(id) != TransferId::none) {
        continue;
      }
      std::vector<BlockId> table(static_cast<std::size_t>(manager_->num_table_blocks(id)));
      manager_->block_table(id, table);
      for (std::size_t i = 0; i < text.tokens.size(); ++i) {
        const auto size = static_cast<std::size_t>(config_.block_size);
        const std::int64_t at =
            index(table[i / size]) * config_.block_size + static_cast<std::int64_t>(i % size);
        for (int r = 0; r < kNumRegions; ++r) {
          accesses.push_back({slot(r, at), sizeof(Digest), false});
          looks.push_back({slot(r, at), mixed(text.digests[i], r)});
        }
      }
    }
    if (looks.empty()) return;
    try {
      engine_->step({});
    } catch (const DeviceError& error) {
      throw Wrong(error.what());
    }
    device_->run(device_->compute_stream(), accesses, [looks, this] {
      for (const Look& look : looks) {
        Digest found;
        std::memcpy(&found, look.at, sizeof found);
        if (found != look.digest) ++num_wrong_digests_;
      }
    });
  }

  // ---- the end

  void finish() {
    say("finish");
    if (chance(4)) {  // in the middle of everything
      engine_->close();
      device_->close();
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
    expect(device_->num_events() == 0, "every event was recycled");
    expect(device_->host_bytes() == 0, "the host tier was given back");
    device_->close();
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

  void check_device() {
    expect(num_wrong_digests_ == 0, "a read found another content than was written");
    if (!device_->violations().empty()) throw Wrong(device_->violations().front().text);
  }

  ProgramOptions options_;
  std::mt19937_64 random_;
  Config config_;
  std::int64_t block_bytes_ = 0;
  std::vector<Digest> pools_[kNumRegions];
  std::int64_t strides_[kNumRegions] = {};
  std::shared_ptr<SimulatedDevice> device_;
  std::unique_ptr<BlockManager> manager_;
  std::unique_ptr<TransferEngine> engine_;
  std::map<SequenceId, Text> texts_;
  std::vector<Text> past_;  // of released sequences
  Digest num_anonymous_ = 0;
  bool may_fail_ = false;
  bool may_be_private_ = false;
  int num_wrong_digests_ = 0;
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
