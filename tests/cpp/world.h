// What a random program does its commands to, and the checks after each.
#pragma once

#include <cstdio>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/block_manager.h"
#include "cuda/cuda_device.h"
#include "cuda/simulated_runtime.h"
#include "host/simulated_device.h"
#include "paged_memory.h"
#include "program.h"
#include "transfer/transfer_engine.h"

namespace pagedkv {

struct Wrong : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void expect(bool holds, const std::string& what) {
  if (!holds) throw Wrong(what);
}

// A manager, an engine and a device, the sequences as their owner knows them, and the chance that
// chooses. After an Error that the state may bring, everything is as it was.
class World {
 protected:
  explicit World(const ProgramOptions& options) : options_(options), random_(options.seed * 2 + 1) {
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
    std::shared_ptr<Device> device;
    if (options.cuda) {
      auto runtime = std::make_shared<SimulatedRuntime>(simulated);
      device_ = {runtime, &runtime->machine()};
      device = gpu_ = std::make_shared<CudaDevice>(runtime, cuda_options());
      gpu_->methods().always(kCopyMethods[static_cast<std::size_t>(below(4))]);
    } else {
      device = device_ = std::make_shared<SimulatedDevice>(simulated);
    }
    if (options.skip) device_->skip(*options.skip);
    memory_ = std::make_unique<PagedMemory>(device_, config_.num_device_blocks, config_.block_size);
    EngineOptions engine;
    engine.num_device_blocks = static_cast<std::int32_t>(config_.num_device_blocks);
    engine.num_host_blocks = static_cast<std::int32_t>(config_.num_host_blocks);
    engine.max_in_flight = 1 + below(4);
    engine_ = std::make_unique<TransferEngine>(device, memory_->block_runs(), engine);
  }

  // Small, so that the ring wraps and chunks end within a region.
  static CudaOptions cuda_options() {
    return {.pinned = {.chunk_bytes = 4096, .num_touching = 1, .ahead = false},
            .ring_bytes = 512,
            .staging_bytes = 100};
  }

  // The caller goes on with one of the two streams that both kinds of machine have.
  void use_stream(int k) {
    device_->use_compute_stream(k);
    if (gpu_) gpu_->use_stream(reinterpret_cast<CudaStream>(std::uintptr_t{2} * k));
  }

  void close_device() {
    if (gpu_) gpu_->close();
    device_->close();
  }

  int below(int n) { return static_cast<int>(random_() % static_cast<std::uint64_t>(n)); }

  bool chance(int n) { return below(n) == 0; }

  void say(const std::string& what) const {
    if (options_.trace) std::printf("  %s\n", what.c_str());
  }

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

  static std::string salt_of(const Text& text) { return text.root == 1 ? "" : "b"; }

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

  void release(const std::vector<SequenceId>& ids) {
    if (!attempt("release", [&] { manager_->release(ids); })) return;
    for (const SequenceId id : ids) {
      if (texts_.at(id).root < 1000) past_.push_back(texts_.at(id));
      texts_.erase(id);
    }
  }

  void forget(SequenceId id) {
    Text& text = texts_.at(id);
    text.rest.insert(text.rest.begin(), text.tokens.begin(), text.tokens.end());
    text.cut(0);
    text.dropped = true;
  }

  void submit(const TransferPlan& plan) { engine_->submit(plan); }

  void fetch(SequenceId id) {
    TransferPlan plan;
    if (!attempt("fetch", [&] { plan = manager_->fetch(id); })) return;
    take_hit(id, texts_.at(id));
    submit(plan);
  }

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
            plan = &manager_->append(ids, tokens, counts);
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
    std::vector<const Text*> texts;
    for (const SequenceId id : ids) texts.push_back(&texts_.at(id));
    memory_->carry_out(*plan, texts);
    may_be_private_ |= manager_->stats().num_transfers > 0;
    manager_->commit(plan->step);
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

  // Queues a look at all that the resident ones of `ids` hold.
  void read(const std::vector<SequenceId>& ids) {
    for (const SequenceId id : ids) {
      const Text& text = texts_.at(id);
      expect(manager_->length(id) == static_cast<std::int64_t>(text.tokens.size()), "length");
      if (!manager_->is_resident(id) || text.tokens.empty()) continue;
      std::vector<BlockId> table(static_cast<std::size_t>(manager_->num_table_blocks(id)));
      manager_->block_table(id, table);
      engine_->step({});
      memory_->look(text, table);
    }
  }

  void check_device() {
    expect(memory_->num_wrong() == 0, "a read found another content than was written");
    if (!device_->violations().empty()) throw Wrong(device_->violations().front().text);
  }

  ProgramOptions options_;
  std::mt19937_64 random_;
  Config config_;
  std::shared_ptr<SimulatedDevice> device_;
  std::shared_ptr<CudaDevice> gpu_;  // on that device's runtime; null if it is used as it is
  std::unique_ptr<PagedMemory> memory_;
  std::unique_ptr<BlockManager> manager_;
  std::unique_ptr<TransferEngine> engine_;
  std::map<SequenceId, Text> texts_;
  std::vector<Text> past_;  // of released sequences
  Digest num_anonymous_ = 0;
  bool may_fail_ = false;
  bool may_be_private_ = false;
};

}  // namespace pagedkv
