#include "cuda/copy_method.h"

#include <algorithm>
#include <cstdio>

#include "core/error.h"

namespace pagedkv {

namespace {

constexpr std::size_t kMostCalls = 512;

// The place of the largest that is not larger; the first if all are.
template <class Sizes>
std::size_t place(const Sizes& sizes, std::size_t wanted) {
  std::size_t at = 0;
  while (at + 1 < sizes.size() && sizes[at + 1] <= wanted) ++at;
  return at;
}

}  // namespace

const char* name(CopyMethod method) {
  switch (method) {
    case CopyMethod::loop: return "loop";
    case CopyMethod::batch: return "batch";
    case CopyMethod::kernel: return "kernel";
    default: return "staged";
  }
}

CopyMethods::CopyMethods(bool has_batch) : has_batch_(has_batch) {
  const CopyMethod best = has_batch ? CopyMethod::batch : CopyMethod::loop;
  for (Entries& entries : entries_) {
    for (auto& row : entries) row.fill({{}, best, best});
  }
}

void CopyMethods::always(std::optional<CopyMethod> method) {
  if (method == CopyMethod::batch && !has_batch_) {
    throw InvalidSpec("copy method \"batch\" needs a CUDA 12.8 driver or later");
  }
  always_ = method;
}

CopyMethod CopyMethods::choose(Direction direction, std::span<const CopyRun> runs,
                               std::size_t num_host_ranges) const {
  if (always_) return *always_;
  // What any other saves is calls: for one piece there is nothing to save.
  if (runs.size() == 1) return CopyMethod::loop;
  std::size_t total = 0;
  for (const CopyRun& run : runs) total += run.bytes;
  const std::size_t mean = total / std::max<std::size_t>(runs.size(), 1);
  const Entry& entry = entries_[static_cast<std::size_t>(direction)][place(kPieceBytes, mean)]
                               [place(kNumPieces, runs.size())];
  const CopyMethod best = 2 * num_host_ranges <= runs.size() ? entry.best : entry.best_apart;
  // With very many, a loop fills the stream's queue, and then each call waits for the one that is
  // carried out.
  if (best != CopyMethod::loop || runs.size() <= kMostCalls) return best;
  return has_batch_ ? CopyMethod::batch : CopyMethod::kernel;
}

void CopyMethods::calibrate(const Measure& measure) {
  for (const Direction direction : {Direction::out, Direction::in}) {
    for (std::size_t size = 0; size < kPieceBytes.size(); ++size) {
      auto& row = entries_[static_cast<std::size_t>(direction)][size];
      for (std::size_t n = 0; n < kNumPieces.size(); ++n) {
        Entry& entry = row[n];
        for (const CopyMethod method : kCopyMethods) {
          if (method == CopyMethod::batch && !has_batch_) continue;
          entry.rate[static_cast<std::size_t>(method)] =
              measure(method, direction, kPieceBytes[size], kNumPieces[n]);
        }
        if (n > 0 && std::ranges::max(entry.rate) == 0) entry.rate = row[n - 1].rate;
        const auto best = [&](auto end) {
          return kCopyMethods[static_cast<std::size_t>(std::max_element(entry.rate.begin(), end) -
                                                       entry.rate.begin())];
        };
        static_assert(kCopyMethods.back() == CopyMethod::staged);
        entry.best = best(entry.rate.end());
        entry.best_apart = best(entry.rate.end() - 1);
      }
    }
  }
}

std::string CopyMethods::table() const {
  std::string text = "direction  piece KiB  pieces   loop  batch kernel staged GB/s  used\n";
  for (const Direction direction : {Direction::out, Direction::in}) {
    for (std::size_t size = 0; size < kPieceBytes.size(); ++size) {
      for (std::size_t n = 0; n < kNumPieces.size(); ++n) {
        const Entry& entry = entries_[static_cast<std::size_t>(direction)][size][n];
        char line[128];
        std::snprintf(line, sizeof line, "%-9s %10zu %7zu %6.1f %6.1f %6.1f %6.1f       %s\n",
                      direction == Direction::out ? "out" : "in", kPieceBytes[size] >> 10,
                      kNumPieces[n], entry.rate[0] / 1e9, entry.rate[1] / 1e9, entry.rate[2] / 1e9,
                      entry.rate[3] / 1e9, name(always_.value_or(entry.best)));
        text += line;
      }
    }
  }
  return text;
}

}  // namespace pagedkv
