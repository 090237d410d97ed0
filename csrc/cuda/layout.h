// Where the bytes are: the only place of the CUDA code that computes addresses. Everything here
// runs on the GPU and on the CPU alike.
#pragma once

#include <cstddef>
#include <cstdint>

#include "transfer/pool.h"

#ifdef __CUDACC__
#define KV_HD __host__ __device__ inline
#else
#define KV_HD inline
#endif

namespace pagedkv {

// Division by a number that is known when a kernel is launched: a multiplication and a shift, exact
// for every numerator below 2^63. (Granlund and Montgomery, "Division by Invariant Integers using
// Multiplication", 1994: with m = ceil(2^(63 + l) / d) and 2^l >= d, n / d = n * m >> (63 + l).)
class Divider {
 public:
  Divider() : Divider(1) {}
  explicit Divider(std::int64_t divisor) : divisor_(static_cast<std::uint64_t>(divisor)) {
    while ((std::uint64_t{1} << shift_) < divisor_) ++shift_;
    if (shift_ == 0) return;
    __extension__ using Wide = unsigned __int128;
    const Wide scaled = Wide{1} << (63 + shift_);
    factor_ = static_cast<std::uint64_t>((scaled + divisor_ - 1) / divisor_);
  }

  // Returns n / divisor, and leaves the remainder in n.
  KV_HD std::int64_t split(std::int64_t& n) const {
    const auto whole = static_cast<std::uint64_t>(n);
    const std::uint64_t quotient = shift_ == 0 ? whole : high(whole, factor_) >> (shift_ - 1);
    n = static_cast<std::int64_t>(whole - quotient * divisor_);
    return static_cast<std::int64_t>(quotient);
  }

 private:
  KV_HD static std::uint64_t high(std::uint64_t a, std::uint64_t b) {
#ifdef __CUDA_ARCH__
    return __umul64hi(a, b);
#else
    __extension__ using Wide = unsigned __int128;
    return static_cast<std::uint64_t>(static_cast<Wide>(a) * b >> 64);
#endif
  }

  std::uint64_t divisor_;
  std::uint64_t factor_ = 0;
  int shift_ = 0;
};

KV_HD std::byte* block_address(const Region& region, std::int64_t block) {
  return region.base + block * region.block_stride;
}

KV_HD std::byte* token_address(const Region& region, std::int64_t block, std::int64_t offset) {
  return block_address(region, block) + offset * region.token_bytes;
}

// All that a kernel touches is global memory (of the device, or page-locked and mapped). The
// compiler cannot see it of pointers that were read from memory, and would ask at every access.
template <class Pointee>
KV_HD Pointee* global(Pointee* pointer) {
#ifdef __CUDA_ARCH__
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

// Collects what all addresses and strides of a kernel are multiples of.
class Alignment {
 public:
  Alignment& with(std::int64_t number) {
    bits_ |= static_cast<std::uint64_t>(number);
    return *this;
  }
  Alignment& with(const void* address) {
    bits_ |= reinterpret_cast<std::uintptr_t>(address);
    return *this;
  }
  Alignment& with(const Region& region) {
    return with(region.base).with(region.block_stride).with(region.token_bytes);
  }
  int word_bytes() const {  // the widest access that they allow: 16, 8, 4, 2 or 1
    int bytes = 16;
    while (bits_ % static_cast<std::uint64_t>(bytes) != 0) bytes /= 2;
    return bytes;
  }

 private:
  std::uint64_t bits_ = 0;
};

// One of a layer's two parts (keys, values) that new tokens are scattered into: token t comes from
// source + t * source_stride.
struct ScatterPart {
  Region region;
  const std::byte* source;
  std::int64_t source_stride;  // in bytes
};

// What the parts of a scatter have in common. `Part` is a ScatterPart, or has one's members.
struct ScatterShape {
  int word_bytes;                    // the widest access that all of them allow
  std::int64_t largest_token_bytes;  // in the pool

  template <class Part>
  static ScatterShape of(const Part* parts, int num_parts, std::int64_t num_tokens) {
    Alignment all;
    std::int64_t largest = 0;
    for (int p = 0; p < num_parts; ++p) {
      all.with(parts[p].region).with(parts[p].source);
      if (num_tokens > 1) all.with(parts[p].source_stride);
      if (parts[p].region.token_bytes > largest) largest = parts[p].region.token_bytes;
    }
    return {all.word_bytes(), largest};
  }
};

}  // namespace pagedkv
