// Call sites that tests leave out, to see that something notices.
//
// In the test build that defines KV_MUTANTS, a function declared with KV_SITE as its last parameter
// knows where it was called from, and does nothing when that is the file and line that a test has
// named. In every other build there is no such parameter and no such check.
#pragma once

#ifdef KV_MUTANTS

#include <source_location>
#include <string>

namespace pagedkv {

inline std::string mutant_file;  // such as "core/block_manager.cpp"
inline unsigned mutant_line = 0;

inline bool is_mutant(const std::source_location& site) {
  return site.line() == mutant_line && std::string(site.file_name()).ends_with(mutant_file);
}

}  // namespace pagedkv

#define KV_SITE , std::source_location site = std::source_location::current()
#define KV_SITE_PARAMETER , [[maybe_unused]] std::source_location site
#define KV_MUTABLE(value) \
  if (::pagedkv::is_mutant(site)) return value

#else

#define KV_SITE
#define KV_SITE_PARAMETER
#define KV_MUTABLE(value)

#endif
