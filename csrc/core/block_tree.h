// The tree of blocks: nodes, who needs them, which of them a lookup finds, and what goes first when
// blocks run out. types.h says what a node is; DESIGN of the whole is in ARCHITECTURE.md.
#pragma once

#include <algorithm>
#include <array>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/block_pool.h"
#include "core/eviction_order.h"
#include "core/mutant.h"
#include "core/prefix_index.h"
#include "core/types.h"

namespace pagedkv {

// What a node has in one tier.
struct Place {
  BlockId block = BlockId::none;       // none: it is not in this tier
  std::int32_t count = 0;              // its holders there
  NodeId first_child = NodeId::none;   // its published children there, the newest first
  NodeId next_sibling = NodeId::none;  // in a free node: the next free node
  NodeId prev_sibling = NodeId::none;
};

// Life of a node:
//   1. add()        private and counted: one holder, no token yet; its holder writes it
//   2. publish()    full and known: lookups find it and several paths may run through it
//   3. unref() to 0 a private node loses its block; a published one becomes cached
//   4. ref() counts a cached node again; eviction takes its block
// It is in a tier from add() or place() there until its block there goes, and it lives as long as
// it is in one.
//
// A holder of a node in a tier is a child that is counted there, or a sequence that lives there and
// ends at it. Whoever is counted has counted ancestors, so the cached nodes of a tier are whole
// subtrees, and all their nodes are published. Whoever is in a tier has its ancestors there too.
struct alignas(64) Node {
  std::array<Place, kNumTiers> place;
  NodeId parent = NodeId::none;  // none: a root
  std::uint32_t mark = 0;        // of the last begin_count() after which it was visited
  std::uint64_t hash = 0;        // of the path's tokens up to here; valid once the node is complete
  std::uint16_t fill = 0;        // tokens written
  std::uint16_t known = 0;       // leading tokens whose ids are known, at most fill
  std::uint16_t leaving = 0;     // holders whose copy-on-write is queued: they leave at commit
  std::uint8_t live = 0;
  std::uint8_t published = 0;  // for a root: sequences below it may publish
};
static_assert(sizeof(Node) == 64);

// How the last holder of a node left: for the eviction order, or, if the node loses its block, for
// the pool. `moved` is hot, but a transfer still reads the block.
enum class Leave { hot, cold, moved };

class BlockTree {
 public:
  BlockTree(std::int32_t num_device_blocks, std::int32_t num_host_blocks, int block_size,
            std::uint64_t seed);

  int block_size() const { return block_size_; }
  const Node& node(NodeId id) const { return nodes_[index(id)]; }
  BlockId block(NodeId id, Tier tier) const { return node(id).place[index(tier)].block; }
  std::int32_t count(NodeId id, Tier tier) const { return node(id).place[index(tier)].count; }
  bool has_children(NodeId id) const {  // published ones
    return node(id).place[0].first_child != NodeId::none ||
           node(id).place[1].first_child != NodeId::none;
  }
  const BlockPool& pool(Tier tier) const { return pools_[index(tier)]; }
  std::int32_t num_cached(Tier tier) const { return orders_[index(tier)].size(); }
  std::int32_t num_available(Tier tier) const { return pool(tier).num_free() + num_cached(tier); }

  // --- roots. A path starts at the root of its salt, or at the anonymous root, which nobody else
  // shares by content.
  NodeId anonymous_root() const { return anonymous_root_; }
  NodeId find_root(std::string_view salt) const;  // none if no sequence and no block has this salt
  NodeId open_root(std::string_view salt);        // the caller refs it or calls drop_if_unused
  void drop_if_unused(NodeId root);
  bool is_root(NodeId id) const { return node(id).parent == NodeId::none; }

  // --- lookup, by comparing tokens
  NodeId find_child(NodeId parent, const Token* tokens) const;
  NodeId find_equal(NodeId id) const;  // the published node with this parent and these tokens
  // The child on the device with the longest common run with `tokens`, of those that is_hit(child)
  // says yes to. Of many children the newest are looked at.
  template <class IsHit>
  std::pair<NodeId, int> find_partial(NodeId parent, std::span<const Token> tokens,
                                      IsHit&& is_hit) const {
    std::pair<NodeId, int> best{NodeId::none, 0};
    const std::size_t most = std::min(tokens.size(), std::size_t(block_size_));
    int candidates = 0;
    for (NodeId id = node(parent).place[0].first_child;
         id != NodeId::none && candidates < kMaxPartialCandidates;
         id = node(id).place[0].next_sibling, ++candidates) {
      const Token* own = this->tokens(id);
      const auto run = std::mismatch(own, own + most, tokens.data()).first - own;
      if (run > best.second && is_hit(id)) best = {id, static_cast<int>(run)};
    }
    return best;
  }

  // --- references
  void ref(NodeId id, Tier tier KV_SITE);  // a node that is in this tier
  void unref(NodeId id, Tier tier, Leave leave KV_SITE);
  int num_holders(NodeId id) const { return node(id).place[0].count + node(id).place[1].count; }
  bool sole_holder_stays(NodeId id) const { return num_holders(id) - node(id).leaving == 1; }
  void mark_leaving(NodeId id) { ++at(id).leaving; }
  void unmark_leaving(NodeId id) { --at(id).leaving; }

  // --- content
  // A private node below a counted parent, with one holder and a block, evicting for it if need be.
  NodeId add(NodeId parent, Tier tier);
  void adopt(NodeId child, NodeId parent) { at(child).parent = parent; }
  void remove(NodeId id, Tier tier);  // a private node whose holder has gone; its parent has others
  void drop(NodeId id) { free_node(id); }  // likewise, its holder becoming one of its parent
  Token* tokens(NodeId id) { return tokens_.data() + index(id) * std::size_t(block_size_); }
  const Token* tokens(NodeId id) const {
    return tokens_.data() + index(id) * std::size_t(block_size_);
  }
  void set_fill(NodeId id, int fill, int known) {
    Node& n = at(id);
    n.fill = static_cast<std::uint16_t>(fill);
    n.known = static_cast<std::uint16_t>(known);
    if (known == block_size_) complete(id);
  }
  void put(NodeId id, int offset, Token token) {  // the node's last token from now on
    tokens(id)[offset] = token;
    set_fill(id, offset + 1, offset + 1);
  }
  bool is_complete(NodeId id) const { return node(id).known == block_size_; }

  // --- between tiers
  // Of the blocks that are free or cached in a tier, place() would take all of these.
  struct Missing {
    std::int32_t blocks = 0;  // for nodes that are not in the tier yet
    std::int32_t cached = 0;  // of nodes that are in it, and would become active
  };
  void begin_count() {  // each node is counted, or visited, once from here on
    if (++mark_ == 0) mark_ = 1;
  }
  bool first_visit(NodeId id) { return std::exchange(at(id).mark, mark_) != mark_; }
  void count_missing(NodeId id, Tier tier, Missing& missing);
  // ref() of each of `ids`, after giving a block, evicting for it if need be, to all nodes on their
  // paths that are not in this tier. Appends those to `placed`.
  void place(std::span<const NodeId> ids, Tier tier, std::vector<NodeId>& placed);
  // A published node takes the block of a private one with the same content.
  void adopt_block(NodeId id, NodeId twin, Tier tier);
  void drop_subtree(NodeId id, Tier tier);  // the blocks of a cached node and of all below it

  // --- publication
  bool may_publish(NodeId id) const { return is_complete(id) && node(node(id).parent).published; }
  void publish(NodeId id KV_SITE);
  // A published node with one holder becomes private. What nobody holds of it and below is evicted.
  void take_over(NodeId id);
  void clear(std::string_view salt);
  void clear_all();

  // --- inspection
  std::span<const Node> nodes() const { return nodes_; }
  std::size_t bytes() const;
  std::int64_t num_evicted() const { return num_evicted_; }
  // Recomputes everything that this class keeps twice; ends[t][n] sequences of a tier end at n.
  using Ends = std::array<std::vector<std::int32_t>, kNumTiers>;
  void verify(const Ends& ends) const;

 private:
  static constexpr int kMaxPartialCandidates = 16;
  struct SaltHash {
    using is_transparent = void;
    std::size_t operator()(std::string_view s) const { return std::hash<std::string_view>{}(s); }
  };
  using Roots = std::unordered_map<std::string, NodeId, SaltHash, std::equal_to<>>;

  Node& at(NodeId id) { return nodes_[index(id)]; }
  NodeId new_node(NodeId& free);
  void free_node(NodeId id);
  void forget_salt(NodeId root);
  void reserve_root();            // the next new_node(free_roots_) does not throw
  void complete(NodeId id);       // all its tokens are known: hash them, and warm up for publish()
  BlockId take_block(Tier tier);  // evicting for it if need be
  void give_block(NodeId id, Tier tier, bool last = false);
  void link_child(NodeId id, Tier tier);
  void unlink_child(NodeId id, Tier tier);
  NodeId any_child(NodeId id) const;
  void evict_one(Tier tier);
  void drop_block(NodeId id, Tier tier);  // of a cached node without children in this tier
  void unpublish(NodeId id);           // without published children; loses what nobody holds of it
  void unpublish_subtree(NodeId top);  // all below it
  void clear_root(NodeId root);
  void verify_tier(Tier tier, const std::vector<std::int32_t>& ends) const;
  void verify_node(NodeId id) const;
  NodeId find(NodeId parent, const Token* tokens, std::uint64_t hash) const;
  std::uint64_t child_hash(NodeId parent, const Token* tokens) const;

  int block_size_;
  std::uint64_t seed_;
  std::vector<Node> nodes_;    // one for each block, and behind them the roots
  std::vector<Token> tokens_;  // block_size per node; roots have none
  NodeId free_nodes_ = NodeId::none;
  NodeId free_roots_ = NodeId::none;
  NodeId anonymous_root_ = NodeId::none;
  std::array<BlockPool, kNumTiers> pools_;
  std::array<EvictionOrder, kNumTiers> orders_;
  PrefixIndex index_;  // published nodes
  Roots roots_;
  std::unordered_map<NodeId, const std::string*> salts_;  // the other way round
  std::uint32_t mark_ = ~std::uint32_t{0};  // next comes the wrap-around, which nobody may notice
  std::int64_t num_evicted_ = 0;
};

}  // namespace pagedkv
