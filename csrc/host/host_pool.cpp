#include "host/host_pool.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "core/error.h"

namespace pagedkv {

namespace {

void require(bool holds, const char* what) {
  if (!holds) throw InvalidSpec(what);
}

template <std::size_t kBytes>
void split_fixed(const std::byte* from, std::int64_t count, std::int64_t num_heads, std::byte* to,
                 std::int64_t head_stride) {
  for (std::int64_t i = 0; i < count; ++i, to += kBytes) {
    for (std::int64_t h = 0; h < num_heads; ++h, from += kBytes) {
      std::memcpy(to + h * head_stride, from, kBytes);
    }
  }
}

// `count` tokens, all heads of one behind the other, to one run per head, `head_stride` apart. They
// are read in the order of memory, which is what it streams best. Heads are mostly of few sizes,
// and a copy of known size is several times faster than a call of memcpy.
void split_heads(const std::byte* from, std::int64_t count, std::int64_t num_heads,
                 std::int64_t head_bytes, std::byte* to, std::int64_t head_stride) {
  switch (head_bytes) {
    case 64: return split_fixed<64>(from, count, num_heads, to, head_stride);
    case 128: return split_fixed<128>(from, count, num_heads, to, head_stride);
    case 256: return split_fixed<256>(from, count, num_heads, to, head_stride);
    case 512: return split_fixed<512>(from, count, num_heads, to, head_stride);
    default:
      for (std::int64_t i = 0; i < count; ++i, to += head_bytes) {
        for (std::int64_t h = 0; h < num_heads; ++h, from += head_bytes) {
          std::memcpy(to + h * head_stride, from, static_cast<std::size_t>(head_bytes));
        }
      }
  }
}

}  // namespace

HostPool::HostPool(std::vector<Region> regions, std::int32_t num_blocks, std::int32_t block_size)
    : regions_(std::move(regions)), num_blocks_(num_blocks), block_size_(block_size) {
  require(num_blocks > 0 && block_size > 0, "num_blocks and block_size: expected positive numbers");
  const auto size = static_cast<std::uint32_t>(block_size);
  if (std::has_single_bit(size)) shift_ = std::countr_zero(size);
  for (const Region& r : regions_) {
    require(r.base != nullptr && r.token_bytes > 0 && r.block_stride >= r.token_bytes * block_size,
            "regions: expected a base, and blocks that do not overlap");
  }
}

const Region& HostPool::region(std::size_t i) const {
  require(i < regions_.size(), "region: no such region");
  return regions_[i];
}

void HostPool::check_copies(std::span<const std::int32_t> copies) const {
  require(copies.size() % 3 == 0, "copies: expected rows of three");
  for (std::size_t i = 0; i < copies.size(); i += 3) {
    const bool inside = copies[i] >= 0 && copies[i] < num_blocks_ && copies[i + 1] >= 0 &&
                        copies[i + 1] < num_blocks_ && copies[i + 2] >= 0 &&
                        copies[i + 2] <= block_size_;
    require(inside, "copies: a block or token count is outside the pool");
  }
}

void HostPool::copy_blocks(std::span<const std::int32_t> copies) {
  check_copies(copies);
  for (const Region& r : regions_) {
    for (std::size_t i = 0; i < copies.size(); i += 3) {
      const std::int64_t source = bounded(copies[i]), target = bounded(copies[i + 1]);
      const std::int64_t asked = copies[i + 2];
      const std::int64_t count = std::clamp<std::int64_t>(asked, 0, block_size_);
      if (source == target) continue;
      std::memcpy(r.base + target * r.block_stride, r.base + source * r.block_stride,
                  static_cast<std::size_t>(count * r.token_bytes));
    }
  }
}

void HostPool::check_slots(std::size_t i, std::span<const std::int64_t> slots) const {
  region(i);
  const auto num_slots =
      static_cast<std::uint64_t>(num_blocks_) * static_cast<std::uint64_t>(block_size_);
  std::uint64_t bits = 0;  // the highest one is set by a negative slot, and by one past the end
  for (const std::int64_t slot : slots) {
    bits |= static_cast<std::uint64_t>(slot) | (num_slots - 1 - static_cast<std::uint64_t>(slot));
  }
  require(bits >> 63 == 0, "slots: a slot is outside the pool");
}

void HostPool::scatter(std::size_t i, std::span<const std::int64_t> slots, const std::byte* source,
                       std::int64_t source_stride) {
  check_slots(i, slots);
  const Part part{region(i), source, source_stride};
  scatter_parts<1>({part}, slots);
}

void HostPool::write(std::size_t layer, std::span<const std::int64_t> slots, const std::byte* k,
                     std::int64_t k_stride, const std::byte* v, std::int64_t v_stride) {
  check_slots(2 * layer, slots);
  scatter_parts<2>({Part{region(2 * layer), k, k_stride}, {region(2 * layer + 1), v, v_stride}},
                   slots);
}

template <std::size_t kNumParts>
void HostPool::scatter_parts(std::array<Part, kNumParts> parts,
                             std::span<const std::int64_t> slots) const {
  const std::int64_t bytes = parts[0].region.token_bytes;
  const bool same = bytes == parts[kNumParts - 1].region.token_bytes;
  switch (same ? bytes : 0) {  // small tokens without a call for each
    case 2: return scatter_tokens<2>(parts, slots);
    case 4: return scatter_tokens<4>(parts, slots);
    case 8: return scatter_tokens<8>(parts, slots);
    case 16: return scatter_tokens<16>(parts, slots);
    default: return scatter_tokens<0>(parts, slots);
  }
}

// The block and the offset of each slot are found once for all parts. A token has kBytes, or, if
// that is 0, its region's token_bytes. The loop reads copies (`parts`, block_size, ...): a store of
// bytes may alias anything else, which would then be read again for each token.
template <std::size_t kBytes, std::size_t kNumParts>
void HostPool::scatter_tokens(std::array<Part, kNumParts> parts,
                              std::span<const std::int64_t> slots) const {
  const std::int64_t block_size = block_size_;
  const std::uint64_t num_slots =
      static_cast<std::uint64_t>(num_blocks_) * static_cast<std::uint64_t>(block_size_);
  const int shift = shift_;
  for (const std::int64_t given : slots) {
    const std::int64_t slot = static_cast<std::uint64_t>(given) < num_slots ? given : 0;
    const std::int64_t block = shift >= 0 ? slot >> shift : slot / block_size;
    const std::int64_t offset = slot - block * block_size;
    for (Part& part : parts) {
      const Region& r = part.region;
      std::memcpy(r.base + block * r.block_stride + offset * r.token_bytes, part.source,
                  kBytes > 0 ? kBytes : static_cast<std::size_t>(r.token_bytes));
      part.source += part.stride;
    }
  }
}

void HostPool::check_gather_shape(std::size_t i, const TableView& table, std::int32_t first_block,
                                  std::span<const std::int32_t> num_tokens,
                                  std::int32_t num_heads) const {
  const Region& r = region(i);
  require(num_heads > 0 && r.token_bytes % num_heads == 0, "num_heads: expected a divisor");
  require(first_block >= 0 && num_tokens.size() == static_cast<std::size_t>(table.num_rows),
          "num_tokens: expected one for each row of the table");
}

void HostPool::check_gather(std::size_t i, const TableView& table, std::int32_t first_block,
                            std::span<const std::int32_t> num_tokens, std::int32_t num_heads,
                            std::int32_t width) const {
  check_gather_shape(i, table, first_block, num_tokens, num_heads);
  for (std::int32_t b = 0; b < table.num_rows; ++b) {
    const std::int64_t tokens = num_tokens[static_cast<std::size_t>(b)];
    const std::int64_t last = first_block + (tokens + block_size_ - 1) / block_size_;
    require(tokens >= 0 && tokens <= width && last <= table.width,
            "num_tokens: a row reaches past the table or the target");
    for (std::int64_t k = first_block; k < last; ++k) {
      const std::int32_t block = table.cells[b * table.stride + k];
      require(block >= 0 && block < num_blocks_, "block_tables: a block is outside the pool");
    }
  }
}

void HostPool::gather(std::size_t i, const TableView& table, std::int32_t first_block,
                      std::span<const std::int32_t> num_tokens, std::int32_t num_heads,
                      std::int32_t width, std::byte* target) {
  check_gather(i, table, first_block, num_tokens, num_heads, width);
  if (width == 0) return;  // the target is empty, and may be nowhere
  const Region& r = region(i);
  const std::int64_t head_bytes = r.token_bytes / num_heads;
  const std::int64_t head_stride = width * head_bytes;
  for (std::int32_t b = 0; b < table.num_rows; ++b) {
    const std::int32_t* cells = table.cells + b * table.stride + first_block;
    const std::int64_t most = std::int64_t{table.width - first_block} * block_size_;
    const std::int64_t tokens = std::clamp<std::int64_t>(num_tokens[static_cast<std::size_t>(b)], 0,
                                                         std::min<std::int64_t>(width, most));
    std::byte* const row = target + b * num_heads * head_stride;
    for (std::int64_t at = 0; at < tokens; at += block_size_, ++cells) {
      const std::byte* block = r.base + bounded(*cells) * r.block_stride;
      const std::int64_t count = std::min<std::int64_t>(tokens - at, block_size_);
      split_heads(block, count, num_heads, head_bytes, row + at * head_bytes, head_stride);
    }
    if (tokens == width) continue;  // also where there is no target, since nobody has a token
    for (std::int32_t h = 0; h < num_heads; ++h) {
      std::memset(row + h * head_stride + tokens * head_bytes, 0,
                  static_cast<std::size_t>((width - tokens) * head_bytes));
    }
  }
}

}  // namespace pagedkv
