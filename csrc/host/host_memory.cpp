#include "host/host_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>

#include "core/check.h"
#include "transfer/device.h"

namespace pagedkv {

std::byte* map_host_memory(std::size_t bytes) {
  void* const memory = ::mmap(nullptr, std::max<std::size_t>(bytes, 1), PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    const char* const why = std::strerror(errno);
    throw DeviceError("no " + std::to_string(bytes) + " bytes of host memory: " + why);
  }
  return static_cast<std::byte*>(memory);
}

void unmap_host_memory(std::byte* memory, std::size_t bytes) {
  KV_CHECK(::munmap(memory, std::max<std::size_t>(bytes, 1)) == 0);
}

}  // namespace pagedkv
