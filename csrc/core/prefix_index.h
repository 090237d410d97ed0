// Finds published nodes by the hash of their path. It decides nothing: callers compare parent and
// tokens.
#pragma once

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

// Open addressing with linear probing, at most two thirds full. A slot holds half of the hash, so
// that a search reads a node only if it is most likely the one. Nothing allocates after the start.
class PrefixIndex {
 public:
  explicit PrefixIndex(std::size_t num_blocks) : slots_(num_blocks + num_blocks / 2 + 8) {}

  // The first node of this hash for which same(node), or none.
  template <class Same>
  NodeId find(std::uint64_t hash, Same&& same) const {
    const std::uint32_t tag = tag_of(hash);
    for (std::size_t i = home(tag); slots_[i].node != NodeId::none; i = after(i)) {
      if (slots_[i].tag == tag && same(slots_[i].node)) return slots_[i].node;
    }
    return NodeId::none;
  }

  void prefetch(std::uint64_t hash) const { __builtin_prefetch(&slots_[home(tag_of(hash))]); }

  void insert(NodeId node, std::uint64_t hash) {
    std::size_t i = home(tag_of(hash));
    while (slots_[i].node != NodeId::none) i = after(i);
    slots_[i] = {tag_of(hash), node};
  }

  // Returns false if the node was not there.
  bool erase(NodeId node, std::uint64_t hash) {
    std::size_t gap = home(tag_of(hash));
    while (slots_[gap].node != node) {
      if (slots_[gap].node == NodeId::none) return false;
      gap = after(gap);
    }
    // Close the gap with what comes later in the run and may stand there.
    for (std::size_t i = after(gap); slots_[i].node != NodeId::none; i = after(i)) {
      const std::size_t wanted = home(slots_[i].tag);
      const bool stays = gap <= i ? gap < wanted && wanted <= i : gap < wanted || wanted <= i;
      if (stays) continue;
      slots_[gap] = slots_[i];
      gap = i;
    }
    slots_[gap].node = NodeId::none;
    return true;
  }

  std::size_t bytes() const { return slots_.capacity() * sizeof(Slot); }

 private:
  struct Slot {
    std::uint32_t tag = 0;
    NodeId node = NodeId::none;
  };

  static std::uint32_t tag_of(std::uint64_t hash) { return static_cast<std::uint32_t>(hash >> 32); }
  std::size_t home(std::uint32_t tag) const { return (std::uint64_t{tag} * slots_.size()) >> 32; }
  std::size_t after(std::size_t i) const { return i + 1 == slots_.size() ? 0 : i + 1; }

  std::vector<Slot> slots_;
};

}  // namespace pagedkv
