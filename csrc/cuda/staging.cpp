#include "cuda/staging.h"

#include <algorithm>
#include <cstdint>

namespace pagedkv {

namespace {

constexpr std::size_t kAlign = 16;  // the widest word that a kernel moves

// The first offset from `used` on that is aligned as `host` is: then a kernel can move words as
// wide as the host address allows.
std::size_t aligned_like(const std::byte* host, std::size_t used) {
  return (used + kAlign - 1) / kAlign * kAlign + reinterpret_cast<std::uintptr_t>(host) % kAlign;
}

}  // namespace

std::byte* host_side(const CopyRun& run, Direction direction) {
  return direction == Direction::out ? run.target : const_cast<std::byte*>(run.source);
}

void sort_by_host(std::vector<CopyRun>& runs, Direction direction) {
  std::ranges::sort(runs, {}, [&](const CopyRun& run) { return host_side(run, direction); });
}

std::size_t num_host_ranges(std::span<const CopyRun> runs, Direction direction) {
  std::size_t num_ranges = 0;
  const std::byte* end = nullptr;
  for (const CopyRun& run : runs) {
    num_ranges += host_side(run, direction) != end;
    end = host_side(run, direction) + run.bytes;
  }
  return num_ranges;
}

std::vector<StagedRound> staged_rounds(std::span<const CopyRun> sorted, Direction direction,
                                       std::byte* staging, std::size_t staging_bytes) {
  const bool out = direction == Direction::out;
  std::vector<StagedRound> rounds(1);
  std::size_t used = 0;
  const std::byte* host_end = nullptr;  // of the last range across the bus
  for (const CopyRun& run : sorted) {
    for (std::size_t at = 0, bytes = 0; at < run.bytes; at += bytes) {
      std::byte* const host = host_side(run, direction) + at;
      bool goes_on = !rounds.back().across.empty() && host == host_end;
      std::size_t begin = goes_on ? used : aligned_like(host, used);
      if (begin >= staging_bytes) {
        rounds.emplace_back();
        goes_on = false;
        begin = aligned_like(host, 0);
      }
      bytes = std::min(run.bytes - at, staging_bytes - begin);
      std::byte* const there = staging + begin;
      StagedRound& round = rounds.back();
      round.inside.push_back(out ? CopyRun{there, run.source + at, bytes}
                                 : CopyRun{run.target + at, there, bytes});
      if (goes_on) {
        round.across.back().bytes += bytes;
      } else {
        round.across.push_back(out ? CopyRun{host, there, bytes} : CopyRun{there, host, bytes});
      }
      used = begin + bytes;
      host_end = host + bytes;
    }
  }
  return rounds;
}

}  // namespace pagedkv
