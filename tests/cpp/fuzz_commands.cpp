// libFuzzer target: a stream of bytes as commands on small pools, valid and invalid ones.
//
// After each command verify() runs, an Error must have changed no count, and every slot that a live
// sequence can read must hold what its tokens say. Slots are written by plans alone. A second
// manager with another hash seed runs along: its plans must be the same.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <string_view>
#include <vector>

#include "core/block_manager.h"
#include "core/error.h"

using namespace pagedkv;

namespace {

void expect(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "expected: %s\n", what);
  std::abort();
}

// The input, then zeros.
struct Bytes {
  const std::uint8_t* data;
  std::size_t left;

  int below(int n) {
    if (left == 0 || n <= 0) return 0;
    --left;
    return *data++ % n;
  }
};

// A sequence as its owner knows it. digests[i] stands for the K and V of tokens 0 .. i.
struct Text {
  SequenceId id{};
  std::uint64_t root = 0;
  std::size_t known = 0;
  std::vector<Token> tokens;
  std::vector<std::uint64_t> digests;

  void grow(Token token) {
    const std::uint64_t last = digests.empty() ? root : digests.back();
    tokens.push_back(token);
    digests.push_back((last ^ static_cast<std::uint64_t>(token + 1)) * 0x9e3779b97f4a7c15u + 1);
  }
  void cut(std::size_t length) {
    tokens.resize(std::min(tokens.size(), length));
    digests.resize(tokens.size());
    known = std::min(known, length);
  }
};

// A batch as the C++ interface takes it.
struct Batch {
  std::vector<std::size_t> rows;  // positions in texts
  std::vector<SequenceId> ids;
  std::vector<std::int64_t> values;
  std::vector<Token> tokens;
};

class Program {
 public:
  explicit Program(Bytes bytes) : bytes_(bytes) {
    config_.block_size = 1 + bytes_.below(4);
    config_.num_device_blocks = 1 + bytes_.below(24);
    config_.max_batch = 1 + bytes_.below(5);
    config_.watermark = std::min<std::int64_t>(bytes_.below(3), config_.num_device_blocks - 1);
    config_.max_model_len = 4 + bytes_.below(40);
    alphabet_ = 1 + bytes_.below(3);
    manager_ = std::make_unique<BlockManager>(config_);
    config_.seed = 0x1234567;
    other_ = std::make_unique<BlockManager>(config_);
    pool_.resize(static_cast<std::size_t>((config_.num_device_blocks + 1) * config_.block_size));
  }

  void run() {
    while (bytes_.left > 0) {
      command(bytes_.below(14));
      check();
    }
  }

 private:
  static constexpr std::string_view kSalts[] = {"", "a", "tenant 2"};

  // Runs on both managers. False: an Error, the same on both, after which no count has changed.
  template <class F>
  bool both(F&& call) {
    const auto before = counts(*manager_);
    const bool ok = succeeds(call, *manager_);
    expect(succeeds(call, *other_) == ok, "the hash seed decides no result");
    if (!ok) expect(counts(*manager_) == before, "an Error changes nothing");
    return ok;
  }

  template <class F>
  static bool succeeds(F&& call, BlockManager& manager) {
    try {
      call(manager);
      return true;
    } catch (const Error&) {
      return false;
    }
  }

  static std::vector<std::int64_t> counts(const BlockManager& manager) {
    const Stats s = manager.stats();
    return {s.device.num_free,    s.device.num_active, s.device.num_cached,   s.num_sequences,
            s.num_steps,          s.num_copies,        s.num_appended_tokens, s.num_hit_tokens,
            s.num_logical_blocks, s.num_merged_blocks, s.num_evicted_blocks};
  }

  std::vector<Token> text() {
    std::vector<Token> tokens;
    if (!texts_.empty()) tokens = texts_[pick()].tokens;
    tokens.resize(std::min<std::size_t>(tokens.size(), static_cast<std::size_t>(bytes_.below(40))));
    for (int n = bytes_.below(10); n > 0; --n) tokens.push_back(bytes_.below(alphabet_));
    return tokens;
  }

  std::size_t pick() {
    return static_cast<std::size_t>(bytes_.below(static_cast<int>(texts_.size())));
  }

  // Different sequences; now and then one twice, or one that is gone.
  Batch batch() {
    Batch batch;
    for (int n = bytes_.below(static_cast<int>(texts_.size()) + 1); n > 0; --n) {
      const std::size_t row = pick();
      if (std::ranges::count(batch.rows, row) > 0 && bytes_.below(8) > 0) continue;
      batch.rows.push_back(row);
      batch.ids.push_back(texts_[row].id);
    }
    if (!batch.ids.empty() && bytes_.below(32) == 31) batch.ids.back() = gone_;
    return batch;
  }

  void command(int which) {
    switch (which) {
      case 0: return create();
      case 1:
      case 2:
      case 3: return append();
      case 4:
      case 5: return commit();
      case 6: return rollback();
      case 7: return fork();
      case 8: return reorder();
      case 9: return truncate();
      case 10: return release();
      case 11: return record();
      case 12: return clear();
      default: return ask();
    }
  }

  void create() {
    Text made;
    SequenceId ids[2];
    int at = 0;
    const int salt = bytes_.below(4);  // 3: anonymous
    const std::vector<Token> prompt = text();
    if (!both([&](BlockManager& m) {
          ids[at++] = salt == 3 ? m.create_anonymous() : m.create(prompt, kSalts[salt]);
        })) {
      return;
    }
    expect(ids[0] == ids[1], "ids repeat");
    made.id = ids[0];
    made.root = salt == 3 ? 1000 + ++num_roots_ : static_cast<std::uint64_t>(salt);
    const std::int64_t hit = manager_->num_cached(made.id);
    for (std::int64_t i = 0; i < hit; ++i) made.grow(prompt[static_cast<std::size_t>(i)]);
    made.known = made.tokens.size();
    texts_.push_back(made);
  }

  void append() {
    Batch b = batch();
    const bool has_tokens = bytes_.below(4) > 0;
    const bool single = bytes_.below(2) == 0;
    for (std::size_t i = 0; i < b.ids.size(); ++i) {
      b.values.push_back(single ? 1 : bytes_.below(10));
      for (std::int64_t n = b.values[i]; n > 0; --n) b.tokens.push_back(bytes_.below(alphabet_));
    }
    const auto given = has_tokens ? std::optional(std::span<const Token>(b.tokens)) : std::nullopt;
    const auto each = single ? BlockManager::Numbers() : b.values;
    if (!both([&](BlockManager& m) { m.append(b.ids, given, each); })) return;
    open_ = true;
    before_.clear();
    rows_ = b.rows;
    auto token = b.tokens.begin();
    for (std::size_t i = 0; i < b.rows.size(); ++i) {
      Text& row = texts_[b.rows[i]];
      before_.push_back(row);
      for (std::int64_t n = b.values[i]; n > 0; --n) row.grow(*token++);
      if (has_tokens) row.known = row.tokens.size();
    }
    carry_out(manager_->plan(), other_->plan());
  }

  void carry_out(const StepPlan& plan, const StepPlan& other) {
    const auto size = static_cast<std::size_t>(config_.block_size);
    const auto first_slot = [&](BlockId block) { return static_cast<std::size_t>(block) * size; };
    const std::vector<std::uint64_t> before = pool_;
    expect(plan.copies.size() == other.copies.size(), "the same copies");
    for (std::size_t i = 0; i < plan.copies.size(); ++i) {
      const BlockCopy& copy = plan.copies[i];
      expect(copy.target == other.copies[i].target, "the same targets");
      for (const BlockCopy& c : plan.copies) {
        expect(c.source != copy.target, "no copy's target is another's source");
        expect(&c == &copy || c.target != copy.target, "each copy has its own target");
      }
      std::copy_n(before.begin() + static_cast<std::ptrdiff_t>(first_slot(copy.source)),
                  copy.num_tokens,
                  pool_.begin() + static_cast<std::ptrdiff_t>(first_slot(copy.target)));
    }
    std::vector<bool> written(pool_.size());
    for (std::size_t row = 0; row < rows_.size(); ++row) {
      const Text& text = texts_[rows_[row]];
      expect(plan.seq_lens[row] == static_cast<std::int64_t>(text.tokens.size()), "the length");
      const BlockId* table = plan.block_tables + row * static_cast<std::size_t>(plan.table_stride);
      for (std::int32_t t = plan.query_starts[row]; t < plan.query_starts[row + 1]; ++t) {
        const auto slot = static_cast<std::size_t>(plan.slots[t]);
        const auto position = static_cast<std::size_t>(plan.positions[t]);
        expect(plan.slots[t] == other.slots[t], "the same slots");
        expect(slot == first_slot(table[position / size]) + position % size, "slots fit tables");
        expect(slot >= size && slot < pool_.size() && !written[slot],
               "each slot once, in the pool");
        written[slot] = true;
        pool_[slot] = text.digests[position];
      }
    }
  }

  void commit() {
    std::vector<std::int64_t> lengths;
    const bool shorter = bytes_.below(3) == 0;
    if (shorter && open_) {
      for (std::size_t i = 0; i < rows_.size(); ++i) {
        const auto least = static_cast<std::int64_t>(before_[i].tokens.size());
        const auto most = static_cast<int>(texts_[rows_[i]].tokens.size());
        lengths.push_back(least + bytes_.below(most - static_cast<int>(least) + 2));
      }
    }
    const std::int64_t step = manager_->plan().step - (bytes_.below(16) == 15);
    if (!both([&](BlockManager& m) { shorter ? m.commit(step, lengths) : m.commit(step); })) return;
    open_ = false;
    for (std::size_t i = 0; i < lengths.size(); ++i) {
      texts_[rows_[i]].cut(static_cast<std::size_t>(lengths[i]));
    }
  }

  void rollback() {
    const std::int64_t step = manager_->plan().step;
    if (!both([&](BlockManager& m) { m.rollback(step); })) return;
    open_ = false;
    for (std::size_t i = 0; i < rows_.size(); ++i) texts_[rows_[i]] = before_[i];
  }

  void fork() {
    if (texts_.empty()) return;
    Text copy = texts_[pick()];
    const std::int64_t n = bytes_.below(4);
    std::vector<SequenceId> ids;
    if (!both([&](BlockManager& m) { ids = m.fork(copy.id, n); })) return;
    expect(ids[0] == copy.id, "the first is the sequence itself");
    for (std::size_t i = 1; i < ids.size(); ++i) {
      copy.id = ids[i];
      texts_.push_back(copy);
    }
  }

  void reorder() {
    Batch b = batch();
    for (std::size_t i = 0; i < b.ids.size(); ++i) {
      b.values.push_back(bytes_.below(static_cast<int>(b.ids.size()) + (bytes_.below(16) == 15)));
    }
    if (!both([&](BlockManager& m) { m.reorder(b.ids, b.values); })) return;
    const std::vector<Text> old = texts_;
    for (std::size_t i = 0; i < b.rows.size(); ++i) {
      texts_[b.rows[i]] = old[b.rows[static_cast<std::size_t>(b.values[i])]];
      texts_[b.rows[i]].id = b.ids[i];
    }
  }

  void truncate() {
    Batch b = batch();
    for (const std::size_t row : b.rows) {
      b.values.push_back(bytes_.below(static_cast<int>(texts_[row].tokens.size()) + 2));
      if (b.values.back() > static_cast<std::int64_t>(texts_[row].tokens.size()) &&
          bytes_.below(8)) {
        b.values.back() = 0;
      }
    }
    if (!both([&](BlockManager& m) { m.truncate(b.ids, b.values); })) return;
    for (std::size_t i = 0; i < b.rows.size(); ++i) {
      texts_[b.rows[i]].cut(static_cast<std::size_t>(b.values[i]));
    }
  }

  void release() {
    Batch b = batch();
    if (!both([&](BlockManager& m) { m.release(b.ids); })) return;
    if (!b.ids.empty()) gone_ = b.ids.front();
    std::ranges::sort(b.rows, std::greater<>());
    for (const std::size_t row : b.rows) {
      texts_.erase(texts_.begin() + static_cast<std::ptrdiff_t>(row));
    }
  }

  // Tells the truth, as a false token would make every later hit on it a false one.
  void record() {
    Batch b = batch();
    for (const std::size_t row : b.rows) {
      const Text& text = texts_[row];
      const std::size_t unknown = text.tokens.size() - text.known;
      const int count = unknown == 0 ? 1 : 1 + bytes_.below(static_cast<int>(unknown));
      b.values.push_back(count);
      for (std::size_t i = 0; i < static_cast<std::size_t>(count); ++i) {
        b.tokens.push_back(text.known + i < text.tokens.size() ? text.tokens[text.known + i] : 0);
      }
    }
    if (!both([&](BlockManager& m) { m.record(b.ids, b.tokens, b.values); })) return;
    for (std::size_t i = 0; i < b.rows.size(); ++i) {
      texts_[b.rows[i]].known += static_cast<std::size_t>(b.values[i]);
    }
  }

  void clear() {
    const int which = bytes_.below(8);
    if (which > 3) return;
    both([&](BlockManager& m) { which == 3 ? m.clear(std::nullopt) : m.clear(kSalts[which]); });
  }

  void ask() {
    const Batch b = batch();
    const std::vector<Token> prompt = text();
    const std::string_view salt = kSalts[bytes_.below(3)];
    std::vector<std::int64_t> answers;
    both([&](BlockManager& m) {
      answers.push_back(m.lookup(prompt, salt).num_tokens);
      answers.push_back(m.num_freed(b.ids));
      if (b.ids.size() <= static_cast<std::size_t>(config_.max_batch)) {
        answers.push_back(m.num_needed(b.ids));
      }
    });
    const std::size_t half = answers.size() / 2;
    expect(std::equal(answers.begin(), answers.begin() + static_cast<std::ptrdiff_t>(half),
                      answers.begin() + static_cast<std::ptrdiff_t>(half)),
           "the same answers");
  }

  void check() const {
    manager_->verify();
    other_->verify();
    expect(counts(*manager_) == counts(*other_), "the hash seed decides no count");
    const TierStats tier = manager_->stats().device;
    expect(tier.num_free + tier.num_active + tier.num_cached == config_.num_device_blocks,
           "free + active + cached == num_blocks");
    const auto size = static_cast<std::size_t>(config_.block_size);
    for (const Text& text : texts_) {
      expect(manager_->length(text.id) == static_cast<std::int64_t>(text.tokens.size()),
             "the length");
      std::vector<BlockId> table(static_cast<std::size_t>(manager_->num_table_blocks(text.id)));
      manager_->block_table(text.id, table);
      for (std::size_t i = 0; i < text.tokens.size(); ++i) {
        const std::size_t slot = static_cast<std::size_t>(table[i / size]) * size + i % size;
        expect(pool_[slot] == text.digests[i], "each slot holds its own token");
      }
    }
  }

  Bytes bytes_;
  Config config_;
  int alphabet_ = 1;
  std::unique_ptr<BlockManager> manager_;
  std::unique_ptr<BlockManager> other_;
  std::vector<std::uint64_t> pool_;
  std::vector<Text> texts_;
  std::vector<Text> before_;       // the open step's rows as they were
  std::vector<std::size_t> rows_;  // and which of texts_ they are
  bool open_ = false;
  SequenceId gone_{12345};
  std::uint64_t num_roots_ = 0;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Program(Bytes{data, size}).run();
  return 0;
}
