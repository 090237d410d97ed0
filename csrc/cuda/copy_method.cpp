#include "cuda/copy_method.h"

#include <algorithm>
#include <cstdio>

#include "core/error.h"

namespace pagedkv {

namespace {
constexpr std::size_t kMostCalls = 512;
}

const char* name(CopyMethod method) {
  switch (method) {
    case CopyMethod::loop: return "loop";
    case CopyMethod::batch: return "batch";
    default: return "kernel";
  }
}

CopyMethods::CopyMethods(bool has_batch) : has_batch_(has_batch) {
  for (auto& direction : entries_) {
    for (Entry& entry : direction) {
      entry = {{}, has_batch ? CopyMethod::batch : CopyMethod::loop};
    }
  }
}

void CopyMethods::always(std::optional<CopyMethod> method) {
  if (method == CopyMethod::batch && !has_batch_) {
    throw InvalidSpec("copy method \"batch\" needs a CUDA 12.8 driver or later");
  }
  always_ = method;
}

CopyMethod CopyMethods::choose(Direction direction, std::span<const CopyRun> runs) const {
  if (always_) return *always_;
  std::size_t total = 0;
  for (const CopyRun& run : runs) total += run.bytes;
  const std::size_t mean = total / std::max<std::size_t>(runs.size(), 1);
  std::size_t size = 0;
  while (size + 1 < kPieceBytes.size() && kPieceBytes[size + 1] <= mean) ++size;
  const CopyMethod best = entries_[static_cast<std::size_t>(direction)][size].best;
  // What a batch or a kernel saves is calls: for one piece there is nothing to save. With very
  // many, a loop fills the stream's queue, and then each call waits for the one that is carried
  // out.
  if (runs.size() == 1) return CopyMethod::loop;
  if (best != CopyMethod::loop || runs.size() <= kMostCalls) return best;
  return has_batch_ ? CopyMethod::batch : CopyMethod::kernel;
}

void CopyMethods::calibrate(const Measure& measure) {
  for (const Direction direction : {Direction::out, Direction::in}) {
    for (std::size_t size = 0; size < kPieceBytes.size(); ++size) {
      Entry& entry = entries_[static_cast<std::size_t>(direction)][size];
      for (const CopyMethod method : kCopyMethods) {
        if (method == CopyMethod::batch && !has_batch_) continue;
        entry.rate[static_cast<std::size_t>(method)] =
            measure(method, direction, kPieceBytes[size]);
      }
      const auto best = std::ranges::max_element(entry.rate) - entry.rate.begin();
      entry.best = kCopyMethods[static_cast<std::size_t>(best)];
    }
  }
}

std::string CopyMethods::table() const {
  std::string text = "direction  piece KiB   loop  batch kernel GB/s  used\n";
  for (std::size_t d = 0; d < entries_.size(); ++d) {
    for (std::size_t size = 0; size < kPieceBytes.size(); ++size) {
      const Entry& entry = entries_[d][size];
      char line[128];
      std::snprintf(line, sizeof line, "%-9s %10zu %6.1f %6.1f %6.1f       %s\n",
                    d == 0 ? "out" : "in", kPieceBytes[size] >> 10, entry.rate[0] / 1e9,
                    entry.rate[1] / 1e9, entry.rate[2] / 1e9, name(always_.value_or(entry.best)));
      text += line;
    }
  }
  return text;
}

}  // namespace pagedkv
