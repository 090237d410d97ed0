// A loop whose turns several threads take.
#pragma once

#include <cstdint>
#include <functional>

namespace pagedkv {

// Calls work(i, thread) once for each i in [0, count) and returns when all are done. The calling
// thread is number 0; helpers, 1 to num_threads - 1, join it as they wake, so that each `thread` is
// one place to work in. `work` must not throw. They are kept, and sleep between loops.
//
// One loop has the helpers at a time: another one, and any in a forked child, where they do not
// exist, is run by its caller alone.
void parallel_for(int num_threads, std::int64_t count,
                  const std::function<void(std::int64_t i, int thread)>& work);

}  // namespace pagedkv
