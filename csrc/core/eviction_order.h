// The cached nodes of one tier, from the coldest (evicted first) to the hottest; and those that
// wait outside the line, because they have children there that must go before them.
#pragma once

#include <vector>

#include "core/check.h"
#include "core/types.h"

namespace pagedkv {

// A doubly linked list through an array, so that every change is O(1) and allocates nothing.
class EvictionOrder {
 public:
  EvictionOrder() : links_(1, Link{0, 0}) {}

  void ensure(std::size_t num_nodes) {
    if (links_.size() < num_nodes + 1) links_.resize(num_nodes + 1);
  }

  std::int32_t size() const { return size_; }                      // those that wait among them
  NodeId coldest() const { return NodeId{links_[0].hotter - 1}; }  // none: nobody is in line
  NodeId hotter(NodeId node) const { return NodeId{link(node).hotter - 1}; }
  bool contains(NodeId node) const { return link(node).hotter != kOut; }
  bool waits(NodeId node) const { return link(node).hotter == kWaits; }

  void push_hot(NodeId node) { insert(at(node), links_[0].colder); }
  void push_cold(NodeId node) { insert(at(node), 0); }
  void push_waiting(NodeId node) {
    Link& link = links_[static_cast<std::size_t>(at(node))];
    KV_CHECK(link.hotter == kOut);
    link.hotter = kWaits;
    ++size_;
  }

  void remove(NodeId node) {
    Link& link = links_[static_cast<std::size_t>(at(node))];
    KV_CHECK(link.hotter != kOut);
    if (link.hotter != kWaits) {
      links_[static_cast<std::size_t>(link.colder)].hotter = link.hotter;
      links_[static_cast<std::size_t>(link.hotter)].colder = link.colder;
    }
    link = Link{kOut, kOut};
    --size_;
  }

  std::size_t bytes() const { return links_.capacity() * sizeof(Link); }

 private:
  // Entry 0 closes the ring: hotter of it is the coldest node. Node n has entry n + 1.
  using Index = std::int32_t;
  static constexpr Index kOut = -1;
  static constexpr Index kWaits = -2;
  struct Link {
    Index colder = kOut;
    Index hotter = kOut;
  };

  const Link& link(NodeId node) const { return links_[static_cast<std::size_t>(at(node))]; }
  static Index at(NodeId node) { return static_cast<Index>(node) + 1; }

  void insert(Index i, Index colder) {
    Link& link = links_[static_cast<std::size_t>(i)];
    KV_CHECK(link.hotter == kOut);
    Link& below = links_[static_cast<std::size_t>(colder)];
    link = Link{colder, below.hotter};
    links_[static_cast<std::size_t>(below.hotter)].colder = i;
    below.hotter = i;
    ++size_;
  }

  std::vector<Link> links_;
  std::int32_t size_ = 0;
};

}  // namespace pagedkv
