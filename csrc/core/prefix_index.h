// Finds candidate nodes by hash. It decides nothing: callers compare parent and tokens.
#pragma once

#include <bit>
#include <cstdint>
#include <vector>

#include "core/types.h"

namespace pagedkv {

// A fast seeded hash of one 64-bit word into a running value.
inline std::uint64_t mix(std::uint64_t state, std::uint64_t word) {
  const auto product =
      static_cast<unsigned __int128>(state ^ word ^ 0x9e3779b97f4a7c15ULL) * 0xd6e8feb86659fd93ULL;
  return static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
}

// A hash table of nodes with chains through an array, the newest first in its chain. Inserting and
// erasing never allocate once ensure() has made room for the node.
class PrefixIndex {
 public:
  explicit PrefixIndex(std::size_t num_blocks)
      : buckets_(std::bit_ceil(num_blocks | 1), NodeId::none), mask_(buckets_.size() - 1) {}

  void ensure(std::size_t num_nodes) {
    if (next_.size() < num_nodes) next_.resize(num_nodes, NodeId::none);
  }

  NodeId first(std::uint64_t hash) const { return buckets_[hash & mask_]; }
  NodeId next(NodeId node) const { return next_[index(node)]; }
  void prefetch(std::uint64_t hash) const { __builtin_prefetch(&buckets_[hash & mask_]); }

  void insert(NodeId node, std::uint64_t hash) {
    NodeId& bucket = buckets_[hash & mask_];
    next_[index(node)] = bucket;
    bucket = node;
  }

  // Returns false if the node was not there.
  bool erase(NodeId node, std::uint64_t hash) {
    NodeId* link = &buckets_[hash & mask_];
    while (*link != node) {
      if (*link == NodeId::none) return false;
      link = &next_[index(*link)];
    }
    *link = next_[index(node)];
    return true;
  }

  std::size_t bytes() const { return (buckets_.capacity() + next_.capacity()) * sizeof(NodeId); }

 private:
  std::vector<NodeId> buckets_;
  std::uint64_t mask_;
  std::vector<NodeId> next_;
};

}  // namespace pagedkv
