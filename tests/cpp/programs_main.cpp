// kv_programs [--seeds N] [--first N] [--threads N] [--skip-fence SITE] [--mutant SITE] [--cuda]
// [--trace]
//
// Runs random programs until one goes wrong; exit code 0 if none did, 1 if one did.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "core/mutant.h"
#include "program.h"

using namespace pagedkv;

int main(int argc, char** argv) {
  std::uint64_t first = 0;
  std::uint64_t num_seeds = 2000;
  unsigned num_threads = std::thread::hardware_concurrency();
  ProgramOptions options;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    const auto value = [&] { return i + 1 < argc ? std::strtoull(argv[++i], nullptr, 10) : 0; };
    if (name == "--seeds") {
      num_seeds = value();
    } else if (name == "--first") {
      first = value();
    } else if (name == "--threads") {
      num_threads = static_cast<unsigned>(value());
    } else if (name == "--skip-fence") {
      options.skip = static_cast<FenceSite>(value());
#ifdef KV_MUTANTS
    } else if (name == "--mutant" && i + 1 < argc) {  // a call site, such as core/sequence.cpp:12
      const std::string site = argv[++i];
      mutant_file = site.substr(0, site.find(':'));
      mutant_line = static_cast<unsigned>(std::atoi(site.c_str() + site.find(':') + 1));
#endif
    } else if (name == "--cuda") {
      options.cuda = true;
    } else if (name == "--trace") {
      options.trace = true;
    } else {
      std::fprintf(stderr, "unknown option %s\n", name.c_str());
      return 2;
    }
  }
  std::atomic<std::uint64_t> next{first};
  std::atomic<bool> wrong{false};
  std::mutex printing;
  const auto work = [&] {
    for (std::uint64_t seed; !wrong && (seed = next++) < first + num_seeds;) {
      ProgramOptions own = options;
      own.seed = seed;
      const std::string what = run_program(own);
      if (what.empty()) continue;
      wrong = true;
      const std::lock_guard lock(printing);
      std::printf("seed %llu: %s (again: --first %llu --seeds 1 --trace)\n",
                  static_cast<unsigned long long>(seed), what.c_str(),
                  static_cast<unsigned long long>(seed));
    }
  };
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < num_threads; ++i) threads.emplace_back(work);
  for (std::thread& thread : threads) thread.join();
  if (!wrong)
    std::printf("%llu programs, nothing wrong\n", static_cast<unsigned long long>(num_seeds));
  return wrong ? 1 : 0;
}
