// What is used here of DLPack 1.x (github.com/dmlc/dlpack): how a tensor is looked at by C
// functions that its library exports, without a Python object in between.
#pragma once

#include <cstdint>

namespace pagedkv::dlpack {

struct Device {
  std::int32_t type;
  std::int32_t id;
  bool operator==(const Device&) const = default;
};

struct DataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
  bool operator==(const DataType&) const = default;
};

inline constexpr DataType kInt64{0, 64, 1};

// Shape and strides are the tensor's own memory, in elements; no strides: dense, row by row.
struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

// __dlpack_c_exchange_api__ of a tensor's type is a capsule of this name.
inline constexpr const char* kCapsule = "dlpack_exchange_api";
inline constexpr std::uint32_t kMajorVersion = 1;

struct ExchangeApi {
  std::uint32_t major;
  std::uint32_t minor;
  ExchangeApi* before;
  void* allocate;
  void* to_managed;
  void* from_managed;
  int (*look_at)(void* object, Tensor* out);  // 0, or -1 with a Python error; may be null
  void* current_stream;
};

}  // namespace pagedkv::dlpack
