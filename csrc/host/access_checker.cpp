#include "host/access_checker.h"

#include <algorithm>
#include <bit>

#include "core/check.h"

namespace pagedkv {

namespace {

std::uintptr_t number(const std::byte* address) {
  return reinterpret_cast<std::uintptr_t>(address);
}

std::string lane_name(int lane) {
  return lane == AccessChecker::kHost ? "the host" : "stream " + std::to_string(lane);
}

}  // namespace

AccessChecker::AccessChecker(std::size_t granule_bytes)
    : granule_bits_(std::countr_zero(granule_bytes)) {
  if (!std::has_single_bit(granule_bytes)) {
    throw InvalidSpec("granule_bytes: expected a power of two");
  }
  clocks_[kHost][kHost] = 1;
}

void AccessChecker::submit(int lane) {
  join(lane, clocks_[kHost]);
  ++clocks_[static_cast<std::size_t>(lane)][static_cast<std::size_t>(lane)];
}

void AccessChecker::join(int lane, const Clock& clock) {
  Clock& mine = clocks_[static_cast<std::size_t>(lane)];
  for (std::size_t i = 0; i < kMaxLanes; ++i) mine[i] = std::max(mine[i], clock[i]);
}

AccessChecker::Cell& AccessChecker::cell(std::uintptr_t granule) {
  const std::uintptr_t key = granule / kLeafCells;
  if (key != last_key_) {
    std::unique_ptr<Leaf>& leaf = leaves_[key];
    if (leaf == nullptr) leaf = std::make_unique<Leaf>();
    last_key_ = key;
    last_leaf_ = leaf.get();
  }
  return (*last_leaf_)[granule % kLeafCells];
}

std::optional<AccessChecker::Conflict> AccessChecker::conflict(const Cell& cell, const Clock& clock,
                                                               bool write) {
  if (cell.write_time > clock[static_cast<std::size_t>(cell.write_lane)]) {
    return Conflict{cell.write_lane, "write"};
  }
  if (!write) return std::nullopt;
  for (std::size_t i = 0; i < kMaxLanes; ++i) {
    if (cell.reads[i] > clock[i]) return Conflict{static_cast<int>(i), "read"};
  }
  return std::nullopt;
}

void AccessChecker::access(int lane, const Access& access, const char* what) {
  if (access.bytes == 0) return;
  if (!freed_.empty()) check_freed(lane, access, what);
  const Clock& clock = clocks_[static_cast<std::size_t>(lane)];
  const std::uint32_t now = clock[static_cast<std::size_t>(lane)];
  const std::uintptr_t first = number(access.begin) >> granule_bits_;
  const std::uintptr_t last = (number(access.begin) + access.bytes - 1) >> granule_bits_;
  bool reported = false;
  for (std::uintptr_t granule = first; granule <= last; ++granule) {
    Cell& at = cell(granule);
    if (!reported) {
      if (const auto other = conflict(at, clock, access.write)) {
        report(*other, lane, what, std::max(number(access.begin), granule << granule_bits_));
        reported = true;
      }
    }
    if (access.write) {
      at = {.reads = {}, .write_time = now, .write_lane = lane};
    } else {
      at.reads[static_cast<std::size_t>(lane)] = now;
    }
  }
}

// In the order of their addresses, a range conflicts with an earlier one if it begins before the
// end of a write, or is a write and begins before the end of anything.
void AccessChecker::copy(int lane, std::span<const CopyRun> runs) {
  accesses_.clear();
  for (const CopyRun& run : runs) {
    if (run.bytes == 0) continue;
    accesses_.push_back({run.source, run.bytes, false});
    accesses_.push_back({run.target, run.bytes, true});
  }
  sorted_.clear();
  for (const Access& a : accesses_) sorted_.emplace_back(number(a.begin), &a);
  std::sort(sorted_.begin(), sorted_.end());
  std::uintptr_t write_end = 0, any_end = 0;
  for (const auto& [begin, a] : sorted_) {
    if (begin < (a->write ? any_end : write_end)) {
      report({lane, "run"}, lane, "another run of the same copy", begin);
      break;
    }
    any_end = std::max(any_end, begin + a->bytes);
    if (a->write) write_end = std::max(write_end, begin + a->bytes);
  }
  for (const Access& a : accesses_) access(lane, a, a.write ? "a copy's write" : "a copy's read");
}

void AccessChecker::check_freed(int lane, const Access& access, const char* what) {
  const std::uintptr_t begin = number(access.begin), end = begin + access.bytes;
  for (const auto& [from, to] : freed_) {
    if (begin < to && from < end) {
      violations_.push_back({std::string(what) + " on " + lane_name(lane) + " uses freed memory",
                             kHost, lane, access.begin});
      return;
    }
  }
}

// Looks at the leaves that exist only: what was never touched needs no check.
void AccessChecker::free(const Access& memory) {
  const std::uintptr_t begin = number(memory.begin), end = begin + memory.bytes;
  freed_.emplace_back(begin, end);
  const std::uintptr_t first = begin >> granule_bits_, last = (end - 1) >> granule_bits_;
  for (std::uintptr_t key = first / kLeafCells; key <= last / kLeafCells; ++key) {
    const auto leaf = leaves_.find(key);
    if (leaf == leaves_.end()) continue;
    for (std::size_t i = 0; i < kLeafCells; ++i) {
      const std::uintptr_t granule = key * kLeafCells + i;
      if (granule < first || granule > last) continue;
      if (const auto other = conflict((*leaf->second)[i], clocks_[kHost], true)) {
        return report(*other, kHost, "freeing it", granule << granule_bits_);
      }
    }
  }
}

void AccessChecker::report(const Conflict& earlier, int later, const char* what,
                           std::uintptr_t address) {
  violations_.push_back({std::string(what) + " on " + lane_name(later) +
                             " is not ordered after a " + earlier.access + " of " +
                             lane_name(earlier.lane),
                         earlier.lane, later, reinterpret_cast<const std::byte*>(address)});
}

}  // namespace pagedkv
