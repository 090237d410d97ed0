// Copies through staging: pieces that are neighbours in host memory, but not on the device, go over
// the bus as one. Between the device's own memory and a staging buffer of it a kernel moves them.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "cuda/copy_method.h"
#include "transfer/device.h"

namespace pagedkv {

std::byte* host_side(const CopyRun& run, Direction direction);

// By address in host memory, as the rounds below need them.
void sort_by_host(std::vector<CopyRun>& runs, Direction direction);
// How many contiguous ranges of host memory sorted runs make up.
std::size_t num_host_ranges(std::span<const CopyRun> runs, Direction direction);

// What fits into staging at once. To the host: first what is inside the device, then what crosses
// the bus; to the device the other way round. Each round uses the staging of the one before.
struct StagedRound {
  std::vector<CopyRun> inside;
  std::vector<CopyRun> across;
};
std::vector<StagedRound> staged_rounds(std::span<const CopyRun> sorted, Direction direction,
                                       std::byte* staging, std::size_t staging_bytes);

}  // namespace pagedkv
