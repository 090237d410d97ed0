// How the pieces of a transfer are copied: what is fastest depends on their size and number, the
// direction, the driver and the machine, so it is measured when a device starts.
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
};
inline constexpr std::array kCopyMethods{CopyMethod::loop, CopyMethod::batch, CopyMethod::kernel};

const char* name(CopyMethod method);

enum class Direction : std::uint8_t { out, in };  // to the host, to the device

class CopyMethods {
 public:
  // Sizes that are measured; a piece counts as the largest of them that is not larger.
  static constexpr std::array<std::size_t, 5> kPieceBytes{
      std::size_t{4} << 10, std::size_t{16} << 10, std::size_t{64} << 10, std::size_t{256} << 10,
      std::size_t{1} << 20};

  explicit CopyMethods(bool has_batch);

  CopyMethod choose(Direction direction, std::span<const CopyRun> runs) const;
  void always(std::optional<CopyMethod> method);  // nullopt: what was measured

  // measure(method, direction, piece bytes) gives bytes per second.
  using Measure = std::function<double(CopyMethod, Direction, std::size_t)>;
  void calibrate(const Measure& measure);
  std::string table() const;  // what was measured, a line for each size

 private:
  struct Entry {
    std::array<double, kCopyMethods.size()> rate{};  // 0: not measured, or not to be had
    CopyMethod best;
  };

  bool has_batch_;
  std::optional<CopyMethod> always_;
  std::array<std::array<Entry, kPieceBytes.size()>, 2> entries_;
};

}  // namespace pagedkv
