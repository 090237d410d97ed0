#include "core/block_tree.h"

#include <cstring>

#include "core/check.h"

namespace pagedkv {

namespace {
// For so many the memory is set aside, and mapped by the system when they are made: so that a new
// root costs the same in any pool.
constexpr std::size_t kNumRoots = 1 << 16;
}  // namespace

BlockTree::BlockTree(std::int32_t num_device_blocks, std::int32_t num_host_blocks, int block_size,
                     std::uint64_t seed)
    : block_size_(block_size),
      seed_(seed),
      pools_{BlockPool(num_device_blocks), BlockPool(num_host_blocks)},
      index_(static_cast<std::size_t>(num_device_blocks) + num_host_blocks) {
  // Every node but a root has a block in some tier, so there are never more.
  const std::size_t num_nodes = static_cast<std::size_t>(num_device_blocks) + num_host_blocks;
  tokens_.resize(num_nodes * std::size_t(block_size_));
  orders_[index(Tier::device)].ensure(num_nodes);
  if (num_host_blocks > 0) orders_[index(Tier::host)].ensure(num_nodes);
  nodes_.reserve(num_nodes + kNumRoots);
  nodes_.resize(num_nodes);
  for (std::size_t i = num_nodes; i-- > 0;) {
    nodes_[i].place[0].next_sibling = free_nodes_;
    free_nodes_ = NodeId{static_cast<std::int32_t>(i)};
  }
  reserve_root();
  anonymous_root_ = new_node(free_roots_);
  at(anonymous_root_).place[0].count = 1;  // it stays
}

std::size_t BlockTree::bytes() const {
  std::size_t sum = nodes_.size() * sizeof(Node) + tokens_.size() * sizeof(Token) + index_.bytes();
  for (const auto& pool : pools_) sum += pool.bytes();
  for (const auto& order : orders_) sum += order.bytes();
  return sum;
}

// ------------------------------------------------------------------------------------- nodes

NodeId BlockTree::new_node(NodeId& free) {
  KV_CHECK(free != NodeId::none);
  const NodeId id = free;
  free = node(id).place[0].next_sibling;
  at(id) = Node{};
  at(id).live = 1;
  return id;
}

void BlockTree::reserve_root() {
  if (free_roots_ != NodeId::none) return;
  nodes_.emplace_back();
  free_roots_ = NodeId{static_cast<std::int32_t>(nodes_.size() - 1)};
}

void BlockTree::free_node(NodeId id) {
  KV_CHECK(node(id).live && !node(id).published && !has_children(id));
  for (const Tier tier : kTiers) {
    if (block(id, tier) != BlockId::none) give_block(id, tier);
  }
  NodeId& free = is_root(id) ? free_roots_ : free_nodes_;
  at(id).live = 0;
  at(id).place[0].next_sibling = free;
  free = id;
}

BlockId BlockTree::take_block(Tier tier) {
  BlockPool& pool = pools_[index(tier)];
  if (pool.num_free() == 0) evict_one(tier);
  return pool.take();
}

void BlockTree::give_block(NodeId id, Tier tier, bool last) {
  BlockId& block = at(id).place[index(tier)].block;
  BlockPool& pool = pools_[index(tier)];
  last ? pool.give_last(block) : pool.give(block);
  block = BlockId::none;
}

NodeId BlockTree::add(NodeId parent, Tier tier) {
  const BlockId block = take_block(tier);
  const NodeId id = new_node(free_nodes_);
  at(id).parent = parent;
  Place& place = at(id).place[index(tier)];
  place.block = block;
  place.count = 1;
  return id;
}

void BlockTree::remove(NodeId id, Tier tier) {
  const NodeId parent = node(id).parent;
  free_node(id);
  KV_CHECK(count(parent, tier) > 1);
  --at(parent).place[index(tier)].count;
}

void BlockTree::complete(NodeId id) {
  Node& n = at(id);
  n.hash = child_hash(n.parent, tokens(id));
  index_.prefetch(n.hash);
}

// ------------------------------------------------------------------------------------- roots

NodeId BlockTree::find_root(std::string_view salt) const {
  const auto it = roots_.find(salt);
  return it == roots_.end() ? NodeId::none : it->second;
}

NodeId BlockTree::open_root(std::string_view salt) {
  if (const NodeId found = find_root(salt); found != NodeId::none) return found;
  reserve_root();
  const NodeId root = free_roots_;
  const auto entry = roots_.emplace(std::string(salt), root).first;
  try {
    salts_.emplace(root, &entry->first);
  } catch (...) {
    roots_.erase(entry);
    throw;
  }
  new_node(free_roots_);
  std::uint64_t hash = seed_;
  for (const char c : salt) hash = mix(hash, static_cast<unsigned char>(c));
  at(root).hash = mix(hash, salt.size());
  at(root).published = 1;
  return root;
}

void BlockTree::drop_if_unused(NodeId root) {
  if (num_holders(root) > 0 || has_children(root)) return;
  if (node(root).published) forget_salt(root);
  free_node(root);
}

void BlockTree::forget_salt(NodeId root) {
  const auto salt = salts_.find(root);
  roots_.erase(roots_.find(*salt->second));
  salts_.erase(salt);
  at(root).published = 0;
}

// ------------------------------------------------------------------------------------ lookup

std::uint64_t BlockTree::child_hash(NodeId parent, const Token* tokens) const {
  std::uint64_t hash = node(parent).hash;
  int i = 0;
  for (; i + 1 < block_size_; i += 2) {
    std::uint64_t word;
    std::memcpy(&word, tokens + i, sizeof word);
    hash = mix(hash, word);
  }
  return i < block_size_ ? mix(hash, static_cast<std::uint64_t>(tokens[i])) : hash;
}

NodeId BlockTree::find(NodeId parent, const Token* tokens, std::uint64_t hash) const {
  const std::size_t bytes = std::size_t(block_size_) * sizeof(Token);
  return index_.find(hash, [&](NodeId id) {
    return node(id).parent == parent && std::memcmp(this->tokens(id), tokens, bytes) == 0;
  });
}

NodeId BlockTree::find_child(NodeId parent, const Token* tokens) const {
  return find(parent, tokens, child_hash(parent, tokens));
}

NodeId BlockTree::find_equal(NodeId id) const {
  return find(node(id).parent, tokens(id), node(id).hash);
}

// -------------------------------------------------------------------------------- references

void BlockTree::ref(NodeId id, Tier tier KV_SITE_PARAMETER) {
  KV_MUTABLE();
  const std::size_t t = index(tier);
  for (;;) {
    Node& n = at(id);
    if (n.place[t].count++ > 0 || n.parent == NodeId::none) return;
    orders_[t].remove(id);
    id = n.parent;
  }
}

void BlockTree::unref(NodeId id, Tier tier, Leave leave KV_SITE_PARAMETER) {
  KV_MUTABLE();
  const std::size_t t = index(tier);
  for (;;) {
    Node& n = at(id);
    KV_CHECK(n.live && n.place[t].count > 0);
    if (--n.place[t].count > 0) return;
    const NodeId parent = n.parent;
    if (parent == NodeId::none) return drop_if_unused(id);
    if (!n.published) {
      give_block(id, tier, leave == Leave::moved);
      if (n.place[index(other(tier))].block == BlockId::none) free_node(id);
    } else if (leave != Leave::cold) {
      orders_[t].push_hot(id);
    } else if (n.place[t].first_child == NodeId::none) {
      orders_[t].push_cold(id);
    } else {
      orders_[t].push_waiting(id);
    }
    id = parent;
  }
}

void BlockTree::evict_one(Tier tier) {
  // The coldest is a leaf: a node gets into line after all its cached children did, at the hot end,
  // or without children at the cold one; and a child is linked only to a parent that is counted.
  const EvictionOrder& order = orders_[index(tier)];
  const NodeId id = order.coldest();
  KV_CHECK(id != NodeId::none);
  if (const NodeId next = order.hotter(id); next != NodeId::none) {  // the next to go, most likely
    index_.prefetch(node(next).hash);
    __builtin_prefetch(&nodes_[index(next)]);
  }
  drop_block(id, tier);
  ++num_evicted_;
}

void BlockTree::drop_block(NodeId id, Tier tier) {
  const Node& n = node(id);
  KV_CHECK(n.published && n.place[index(tier)].count == 0 &&
           n.place[index(tier)].first_child == NodeId::none);
  if (n.place[index(other(tier))].block != BlockId::none) {
    orders_[index(tier)].remove(id);
    unlink_child(id, tier);
    give_block(id, tier);
    return;
  }
  const NodeId parent = n.parent;
  unpublish(id);
  if (is_root(parent)) drop_if_unused(parent);
}

// ------------------------------------------------------------------------------- publication

void BlockTree::link_child(NodeId id, Tier tier) {
  const std::size_t t = index(tier);
  Place& own = at(id).place[t];
  Place& parent = at(node(id).parent).place[t];
  own.prev_sibling = NodeId::none;
  own.next_sibling = parent.first_child;
  if (own.next_sibling != NodeId::none) at(own.next_sibling).place[t].prev_sibling = id;
  parent.first_child = id;
}

void BlockTree::unlink_child(NodeId id, Tier tier) {
  const std::size_t t = index(tier);
  const Place& own = node(id).place[t];
  Place& parent = at(node(id).parent).place[t];
  if (own.prev_sibling != NodeId::none) {
    at(own.prev_sibling).place[t].next_sibling = own.next_sibling;
  } else {
    KV_CHECK(parent.first_child == id);
    parent.first_child = own.next_sibling;
  }
  if (own.next_sibling != NodeId::none) {
    at(own.next_sibling).place[t].prev_sibling = own.prev_sibling;
  }
  const NodeId above = node(id).parent;
  if (parent.first_child == NodeId::none && !is_root(above) && orders_[t].waits(above)) {
    orders_[t].remove(above);
    orders_[t].push_cold(above);
  }
}

NodeId BlockTree::any_child(NodeId id) const {
  const NodeId child = node(id).place[0].first_child;
  return child != NodeId::none ? child : node(id).place[1].first_child;
}

void BlockTree::publish(NodeId id KV_SITE_PARAMETER) {
  KV_MUTABLE();
  Node& n = at(id);
  KV_CHECK(!n.published && may_publish(id));
  n.published = 1;
  for (const Tier tier : kTiers) {
    if (block(id, tier) != BlockId::none) link_child(id, tier);
  }
  index_.insert(id, n.hash);
}

void BlockTree::unpublish(NodeId id) {
  Node& n = at(id);
  KV_CHECK(n.published && !has_children(id));
  KV_CHECK(index_.erase(id, n.hash));
  n.published = 0;
  for (const Tier tier : kTiers) {
    if (block(id, tier) == BlockId::none) continue;
    unlink_child(id, tier);
    if (count(id, tier) > 0) continue;
    orders_[index(tier)].remove(id);
    give_block(id, tier);
  }
  if (num_holders(id) == 0) free_node(id);
}

void BlockTree::unpublish_subtree(NodeId top) {
  // Bottom up, as in drop_subtree().
  NodeId id = top;
  for (;;) {
    for (NodeId child; (child = any_child(id)) != NodeId::none;) id = child;
    if (id == top) return;
    const NodeId parent = node(id).parent;
    unpublish(id);
    id = parent;
  }
}

void BlockTree::take_over(NodeId id) {
  KV_CHECK(num_holders(id) == 1);
  const auto num_free = [this] { return pools_[0].num_free() + pools_[1].num_free(); };
  num_evicted_ -= num_free();
  unpublish_subtree(id);
  unpublish(id);
  num_evicted_ += num_free();
}

void BlockTree::clear(std::string_view salt) {
  if (const NodeId root = find_root(salt); root != NodeId::none) clear_root(root);
}

void BlockTree::clear_all() {
  while (!roots_.empty()) clear_root(roots_.begin()->second);
}

// Paths that are in use go on under this root, but nothing below it is published again.
void BlockTree::clear_root(NodeId root) {
  unpublish_subtree(root);
  forget_salt(root);
  drop_if_unused(root);
}

}  // namespace pagedkv
