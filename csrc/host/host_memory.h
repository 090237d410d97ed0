// Memory of the host tier, from the system: zeroed, aligned to OS pages, and taken only as it is
// first touched.
#pragma once

#include <cstddef>

namespace pagedkv {

std::byte* map_host_memory(std::size_t bytes);  // throws DeviceError if there is none
void unmap_host_memory(std::byte* memory, std::size_t bytes);

}  // namespace pagedkv
