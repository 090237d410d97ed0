// A test that hangs shall fail: the process ends when a Watchdog lives longer than its seconds.
#pragma once

#include <unistd.h>

struct Watchdog {
  explicit Watchdog(unsigned seconds) { ::alarm(seconds); }
  ~Watchdog() { ::alarm(0); }
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;
};
