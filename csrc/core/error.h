// What operation brings: thrown before anything has changed.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/types.h"

namespace pagedkv {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// An argument is out of range or of the wrong form.
class InvalidSpec : public Error {
 public:
  using Error::Error;
};

// The call is right, but not now: a step is open, or a plan is stale.
class InvalidState : public Error {
 public:
  using Error::Error;
};

class UnknownSequence : public Error {
 public:
  explicit UnknownSequence(SequenceId id)
      : Error("no live sequence has the id " + std::to_string(static_cast<std::int64_t>(id)) +
              ": it was never issued, or it was released") {}
};

// The sequence's blocks are not on the device: it is on the host, on its way, or lost its path.
class NotResident : public Error {
 public:
  NotResident(SequenceId id, const std::string& why, TransferId waits_for = TransferId::none)
      : Error("sequence " + std::to_string(static_cast<std::int64_t>(id)) + " " + why),
        transfer(waits_for) {}

  const TransferId transfer;  // none: no transfer under way brings it
};

class OutOfBlocks : public Error {
 public:
  OutOfBlocks(Tier in, std::int64_t wanted, std::int64_t left)
      : Error("out of blocks"), tier(in), needed(wanted), available(left) {}

  const Tier tier;
  const std::int64_t needed;
  const std::int64_t available;
};

}  // namespace pagedkv
