#include "cuda/copy_method.h"

#include <algorithm>
#include <cstdio>

#include "core/error.h"

namespace pagedkv {

namespace {

constexpr std::size_t kMostCalls = 512;
constexpr double kClearly = 1.1;

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

CopyMethods::CopyMethods(bool has_batch, bool has_kernel)
    : has_batch_(has_batch), has_kernel_(has_kernel) {}

bool CopyMethods::has(CopyMethod method) const {
  return (method != CopyMethod::batch || has_batch_) &&
         (method != CopyMethod::kernel || has_kernel_);
}

void CopyMethods::always(std::optional<CopyMethod> method) {
  if (method == CopyMethod::batch && !has_batch_) {
    throw InvalidSpec(
        "copy method \"batch\" needs a CUDA 12.8 driver or later, and pinned memory that the GPU "
        "reaches at the host's addresses");
  }
  if (method == CopyMethod::kernel && !has_kernel_) {
    throw InvalidSpec("copy method \"kernel\": here kernels cannot reach pinned host memory");
  }
  always_ = method;
}

bool CopyMethods::may_stage() const {
  if (always_) return *always_ == CopyMethod::staged;
  return std::ranges::any_of(entries_, [&](const Entries& entries) {
    return std::ranges::any_of(entries, [&](const auto& row) {
      return std::ranges::any_of(
          row, [&](const Rates& rates) { return best(rates, true, false) == CopyMethod::staged; });
    });
  });
}

void CopyMethods::rule_out_staging() {
  if (always_ == CopyMethod::staged) always_.reset();
  for (Entries& entries : entries_) {
    for (auto& row : entries) {
      for (Rates& rates : row) rates[static_cast<std::size_t>(CopyMethod::staged)] = 0;
    }
  }
}

// The copy engines go first, unless a kernel is clearly faster, which takes processors from the
// model. `neighbours`: the pieces lie side by side in host memory, as staging needs them. `many`: a
// loop would fill the stream's queue, and then each call waits until an earlier copy has ended.
CopyMethod CopyMethods::best(const Rates& rates, bool neighbours, bool many) const {
  CopyMethod best = has_batch_ ? CopyMethod::batch : CopyMethod::loop;
  double highest = 0;
  for (const CopyMethod method : kCopyMethods) {
    const double rate = rates[static_cast<std::size_t>(method)];
    if (rate == 0 || (method == CopyMethod::staged && !neighbours)) continue;
    if (method == CopyMethod::loop && many) continue;
    const bool on_processors = method == CopyMethod::kernel || method == CopyMethod::staged;
    const bool over_engines =
        on_processors && (best == CopyMethod::loop || best == CopyMethod::batch);
    if (rate <= highest * (over_engines ? kClearly : 1)) continue;
    best = method;
    highest = rate;
  }
  return best;
}

CopyMethod CopyMethods::choose(Direction direction, std::span<const CopyRun> runs,
                               std::size_t num_host_ranges) const {
  // Any other method saves calls only: for one piece there is nothing to save.
  if (runs.size() == 1 && always_ != CopyMethod::kernel) return CopyMethod::loop;
  if (always_) return *always_;
  std::size_t total = 0;
  for (const CopyRun& run : runs) total += run.bytes;
  const std::size_t mean = total / std::max<std::size_t>(runs.size(), 1);
  return best(entries_[static_cast<std::size_t>(direction)][place(kPieceBytes, mean)]
                      [place(kNumPieces, runs.size())],
              2 * num_host_ranges <= runs.size(), runs.size() > kMostCalls);
}

void CopyMethods::calibrate(const Measure& measure) {
  for (const Direction direction : {Direction::out, Direction::in}) {
    for (std::size_t size = 0; size < kPieceBytes.size(); ++size) {
      auto& row = entries_[static_cast<std::size_t>(direction)][size];
      for (std::size_t n = 0; n < kNumPieces.size(); ++n) {
        Rates& rates = row[n];
        for (const CopyMethod method : kCopyMethods) {
          if (!has(method)) continue;
          rates[static_cast<std::size_t>(method)] =
              measure(method, direction, kPieceBytes[size], kNumPieces[n]);
        }
        if (n > 0 && std::ranges::max(rates) == 0) rates = row[n - 1];
      }
    }
  }
}

std::string CopyMethods::table() const {
  std::string text =
      "direction  piece KiB  pieces   loop  batch kernel staged GB/s  used    if apart\n";
  for (const Direction direction : {Direction::out, Direction::in}) {
    for (std::size_t size = 0; size < kPieceBytes.size(); ++size) {
      for (std::size_t n = 0; n < kNumPieces.size(); ++n) {
        const Rates& rates = entries_[static_cast<std::size_t>(direction)][size][n];
        char line[128];
        std::snprintf(line, sizeof line, "%-9s %10zu %7zu %6.1f %6.1f %6.1f %6.1f       %-7s %s\n",
                      direction == Direction::out ? "out" : "in", kPieceBytes[size] >> 10,
                      kNumPieces[n], rates[0] / 1e9, rates[1] / 1e9, rates[2] / 1e9, rates[3] / 1e9,
                      name(always_.value_or(best(rates, true, false))),
                      name(always_.value_or(best(rates, false, false))));
        text += line;
      }
    }
  }
  return text;
}

}  // namespace pagedkv
