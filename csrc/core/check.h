// Assertions for defects of pagedkv itself, in every build: they are cheap, and a wrong block table
// corrupts text silently. What a caller can cause is an Error instead (error.h).
#pragma once

#include <stdexcept>
#include <string>

namespace pagedkv {

class BrokenInvariant : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};

[[noreturn]] inline void broken(const char* what, const char* file, int line) {
  throw BrokenInvariant(std::string(what) + " does not hold (" + file + ":" + std::to_string(line) +
                        ")");
}

}  // namespace pagedkv

#define KV_CHECK(condition)                                   \
  do {                                                        \
    if (!(condition)) [[unlikely]]                            \
      ::pagedkv::broken(#condition, __FILE_NAME__, __LINE__); \
  } while (false)
