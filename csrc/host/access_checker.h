// Finds accesses to memory that nothing orders, whether or not a run happened to go wrong.
//
// Every stream, and the host, is a *lane* with a vector clock: for each lane, how much of its work
// is known to come before what the lane does next. The clocks follow what was declared (fences,
// records, what the host has been told), never when something ran, so a race is found under any
// schedule. Per granule of memory the checker keeps the last write and, per lane, the last read
// since then; a lane's earlier reads need no memory, since they come before its last.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "transfer/device.h"

namespace pagedkv {

// A piece of work reads or writes `bytes` bytes from `begin` on.
struct Access {
  const std::byte* begin;
  std::size_t bytes;
  bool write;
};

// Two accesses, one of them a write, that nothing orders; or one to memory that was freed. Lane 0
// is the host, the others are streams in the order in which they were made.
struct Violation {
  std::string text;
  int earlier;
  int later;
  const std::byte* address;
};

class AccessChecker {
 public:
  static constexpr int kMaxLanes = 16;
  static constexpr int kHost = 0;
  using Clock = std::array<std::uint32_t, kMaxLanes>;

  // Ranges are widened to whole granules: a power of two, at most what the caller's blocks are
  // aligned to, or neighbours are taken for conflicts.
  explicit AccessChecker(std::size_t granule_bytes);

  // Something is enqueued on `lane`: it comes after all that the host has done and been told.
  void submit(int lane);
  const Clock& clock(int lane) const { return clocks_[static_cast<std::size_t>(lane)]; }
  // What `lane` does from now on comes after all that `clock` knows of.
  void join(int lane, const Clock& clock);

  // Checks what was submitted last on `lane`, or what the host does now.
  void access(int lane, const Access& access, const char* what);
  void copy(int lane, std::span<const CopyRun> runs);  // the runs have no order among themselves
  void free(const Access& memory);                     // whoever uses it later is reported

  const std::vector<Violation>& violations() const { return violations_; }

 private:
  struct Cell {
    Clock reads{};
    std::uint32_t write_time = 0;
    int write_lane = kHost;
  };
  static constexpr std::size_t kLeafCells = 64;
  using Leaf = std::array<Cell, kLeafCells>;

  Cell& cell(std::uintptr_t granule);
  struct Conflict {
    int lane;
    const char* access;
  };
  // An earlier access to `cell` that `clock` knows nothing of.
  static std::optional<Conflict> conflict(const Cell& cell, const Clock& clock, bool write);
  void check_freed(int lane, const Access& access, const char* what);
  void report(const Conflict& earlier, int later, const char* what, std::uintptr_t address);

  int granule_bits_;
  std::array<Clock, kMaxLanes> clocks_{};
  std::unordered_map<std::uintptr_t, std::unique_ptr<Leaf>> leaves_;
  std::uintptr_t last_key_ = ~std::uintptr_t{0};  // accesses mostly stay in a leaf for a while
  Leaf* last_leaf_ = nullptr;
  std::vector<std::pair<std::uintptr_t, std::uintptr_t>> freed_;
  std::vector<std::pair<std::uintptr_t, const Access*>> sorted_;  // reused by copy()
  std::vector<Access> accesses_;
  std::vector<Violation> violations_;
};

}  // namespace pagedkv
