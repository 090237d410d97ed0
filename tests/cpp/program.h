// One random program over a manager, a transfer engine and a simulated device, checked as it runs.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "transfer/device.h"

namespace pagedkv {

struct ProgramOptions {
  std::uint64_t seed = 0;
  int num_commands = 60;
  std::optional<FenceSite> skip;  // a fence that the device leaves out
  bool cuda = false;              // the machine is a CUDA device on a simulated runtime
  bool trace = false;             // print every command
};

// What went wrong, in words; empty if nothing did.
//
// A program creates, appends, forks, reorders, truncates and releases sequences, swaps them out and
// in, fetches, drops and restores, polls, waits, cancels, lets copies fail, and changes streams. K
// and V are digests of each token's history. Wrong is: a digest read that is not the one expected,
// two accesses that nothing orders, a count that verify() does not find again, a call that fails
// where it must not, a block or a byte that is not given back at the end.
// A copy that fails on a CUDA device is the end of that device, so there none does.
std::string run_program(const ProgramOptions& options);

}  // namespace pagedkv
