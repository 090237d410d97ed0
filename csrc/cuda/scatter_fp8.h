// ScatterKv for pools of 8-bit floats: value / scale, rounded on the way into its slot. Sources are
// aligned as their values are.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cuda/fp8.h"
#include "cuda/layout.h"

namespace pagedkv {

enum class SourceType : std::uint8_t { bf16, fp16, fp32 };

// Values that are moved at once, by as many accesses of 16 bytes as they need.
template <class Value, int kCount>
struct alignas(sizeof(Value) * kCount < 16 ? alignof(Value) : 16) Values {
  Value value[kCount];
};

struct ScatterFp8 {
  struct Source {  // of a layer's keys, or of its values
    const std::byte* data;
    std::int64_t stride;  // in bytes, from one token to the next
    float scale;          // what a stored value is multiplied by to read it
  };
  static constexpr int kWide = 16;  // values of an item, where all is aligned for it; else 1

  struct Part : ScatterPart {
    float scale;
  };
  Part parts[2];
  const std::int64_t* slots;
  SourceType source_type;
  Fp8 format;
  int values;          // of an item
  std::int64_t count;  // of items, or of places where one can be
  Divider by_token;    // items of the larger part's token
  Divider by_parts;
  Divider by_block;  // block_size

  static ScatterFp8 make(const Part* parts, int num_parts, SourceType source_type, Fp8 format,
                         const std::int64_t* slots, std::int64_t num_tokens,
                         std::int32_t block_size) {
    ScatterFp8 kernel{};
    std::copy_n(parts, num_parts, kernel.parts);
    const auto [word_bytes, largest] = ScatterShape::of(parts, num_parts, num_tokens);
    kernel.slots = slots;
    kernel.source_type = source_type;
    kernel.format = format;
    kernel.values = word_bytes == kWide ? kWide : 1;
    kernel.count = num_tokens * num_parts * (largest / kernel.values);
    kernel.by_token = Divider(largest / kernel.values);
    kernel.by_parts = Divider(num_parts);
    kernel.by_block = Divider(block_size);
    return kernel;
  }

  // Item i, for sources of type Value and kCount == values.
  template <class Value, int kCount>
  KV_HD void convert(std::int64_t i) const {
    std::int64_t p = by_token.split(i);
    const std::int64_t token = by_parts.split(p);
    const Part& part = parts[p];
    const std::int64_t at = i * kCount;
    if (at >= part.region.token_bytes) return;
    std::int64_t offset = slots[token];
    const std::int64_t block = by_block.split(offset);
    const std::byte* const from = part.source + token * part.source_stride;
    const auto in = *reinterpret_cast<const Values<Value, kCount>*>(
        global(from + at * static_cast<std::int64_t>(sizeof(Value))));
    Values<std::uint8_t, kCount> out;
    for (int v = 0; v < kCount; ++v) {
      out.value[v] = to_fp8(to_float(in.value[v]) / part.scale, format);
    }
    *reinterpret_cast<Values<std::uint8_t, kCount>*>(
        global(token_address(part.region, block, offset) + at)) = out;
  }

  // Calls run.operator()<Value, kCount>() with the types that convert() needs.
  template <class Run>
  auto dispatch(const Run& run) const {
    switch (source_type) {
      case SourceType::bf16: return dispatch_count<Bf16>(run);
      case SourceType::fp16: return dispatch_count<Fp16>(run);
      default: return dispatch_count<float>(run);
    }
  }

 private:
  template <class Value, class Run>
  auto dispatch_count(const Run& run) const {
    return values == kWide ? run.template operator()<Value, kWide>()
                           : run.template operator()<Value, 1>();
  }
};

}  // namespace pagedkv
