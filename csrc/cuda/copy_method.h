// How the pieces of a transfer are copied. Which method is fastest depends on their size and
// number, the direction, the driver and the machine: so it is measured when a cache with a host
// tier starts.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>

#include "transfer/device.h"

namespace pagedkv {

enum class CopyMethod : std::uint8_t {
  loop,    // a call for each piece
  batch,   // one call for all
  kernel,  // transfer_blocks: the GPU's cores read and write host memory
  staged,  // transfer_blocks inside the device, and what it has collected as one (staging.h)
};
inline constexpr std::array kCopyMethods{CopyMethod::loop, CopyMethod::batch, CopyMethod::kernel,
                                         CopyMethod::staged};

const char* name(CopyMethod method);

enum class Direction : std::uint8_t { out, in };  // to the host, to the device

class CopyMethods {
 public:
  // Measured are pieces of these sizes, in these numbers. A transfer counts as the largest size and
  // the largest number that are not above its own; its size is the mean of its pieces.
  static constexpr std::array<std::size_t, 5> kPieceBytes{
      std::size_t{4} << 10, std::size_t{16} << 10, std::size_t{64} << 10, std::size_t{256} << 10,
      std::size_t{1} << 20};
  static constexpr std::array<std::size_t, 3> kNumPieces{2, 16, 128};

  // Whether there is a call for a batch, and kernels can reach pinned host memory.
  explicit CopyMethods(bool has_batch, bool has_kernel = true);

  bool has(CopyMethod method) const;

  // For pieces that make up `num_host_ranges` contiguous ranges of host memory.
  CopyMethod choose(Direction direction, std::span<const CopyRun> runs,
                    std::size_t num_host_ranges) const;
  void always(std::optional<CopyMethod> method);  // nullopt: what was measured
  void rule_out_staging();                        // there is no memory for it
  bool may_stage() const;

  // measure(method, direction, piece bytes, number of pieces) gives bytes per second; pieces are
  // neighbours in host memory. 0: not to be had, or too much to measure: then as with fewer.
  using Measure = std::function<double(CopyMethod, Direction, std::size_t, std::size_t)>;
  void calibrate(const Measure& measure);
  std::string table() const;  // what was measured, a line for each size and number

 private:
  using Rates = std::array<double, kCopyMethods.size()>;  // 0: not measured, or not to be had
  using Entries = std::array<std::array<Rates, kNumPieces.size()>, kPieceBytes.size()>;

  CopyMethod best(const Rates& rates, bool neighbours, bool many) const;

  bool has_batch_;
  bool has_kernel_;
  std::optional<CopyMethod> always_;
  std::array<Entries, 2> entries_{};
};

}  // namespace pagedkv
