// Floats of 8 bits, rounded to nearest even, the same bits on the GPU and on the CPU. What is too
// large, infinity too, becomes the largest finite value. NaN is 0x7f, whatever its sign, which
// torch's conversion keeps.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/layout.h"

#ifdef __CUDACC__
#include <cuda_fp8.h>
#endif

namespace pagedkv {

enum class Fp8 : std::uint8_t { e4m3, e5m2 };  // torch.float8_e4m3fn and float8_e5m2

// Values as they are in memory.
struct Bf16 {
  std::uint16_t bits;
};
struct Fp16 {
  std::uint16_t bits;
};

KV_HD float float_of(std::uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

KV_HD float to_float(float value) { return value; }
KV_HD float to_float(Bf16 value) { return float_of(std::uint32_t{value.bits} << 16); }
KV_HD float to_float(Fp16 value) {
  const std::uint32_t magnitude = value.bits & 0x7fffu;
  const std::uint32_t sign = (value.bits & 0x8000u) << 16;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | magnitude << 13);
  // A float's exponent is larger by 112; a product with a power of two is exact.
  return float_of(sign | magnitude << 13) * 0x1p112f;
}

// The rounding itself, for machines without an instruction for it.
KV_HD std::uint8_t round_to_fp8(std::uint32_t bits, Fp8 format) {
  const int mantissa = format == Fp8::e4m3 ? 3 : 2;
  const int bias = format == Fp8::e4m3 ? 7 : 15;
  const std::uint32_t largest = format == Fp8::e4m3 ? 0x7e : 0x7b;
  const int exponent = static_cast<int>(bits >> 23 & 0xff) - 127 + bias;
  const std::uint32_t significand = (bits & 0x7fffffu) | 0x800000u;
  // Below the normal numbers, each exponent less is one more bit to drop.
  const int dropped = 23 - mantissa + (exponent < 1 ? 1 - exponent : 0);
  std::uint32_t result = 0;
  if (dropped <= 24) {  // else less than half of the smallest number
    const std::uint32_t half = 1u << (dropped - 1);
    const std::uint32_t odd = significand >> dropped & 1;
    result = (significand + half - 1 + odd) >> dropped;
    // The leading bit counts as one step of the exponent, and so does a carry.
    if (exponent > 1) result += static_cast<std::uint32_t>(exponent - 1) << mantissa;
  }
  return static_cast<std::uint8_t>((result < largest ? result : largest) | (bits >> 24 & 0x80u));
}

KV_HD std::uint8_t to_fp8(float value, Fp8 format) {
  if (value != value) return 0x7f;
#ifdef __CUDA_ARCH__
  return __nv_cvt_float_to_fp8(value, __NV_SATFINITE, format == Fp8::e4m3 ? __NV_E4M3 : __NV_E5M2);
#else
  std::uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return round_to_fp8(bits, format);
#endif
}

}  // namespace pagedkv
