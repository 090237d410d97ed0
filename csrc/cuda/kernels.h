// What runs on the GPU. Every kernel here moves words: word i goes from one address to another, in
// any order and side by side. A kernel is the function that says which; launch.cu has the loop
// around it for the GPU, tests have one for the CPU.
//
// Arrays that a kernel reads (regions, slots, tables, ...) are in memory that the GPU can read.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cuda/layout.h"

namespace pagedkv {

struct Move {
  const std::byte* from;  // null: zeros
  std::byte* to;          // null: nothing to do
};

struct Words {
  int bytes = 16;          // of one word
  std::int64_t count = 0;  // of them, or of places where one can be
};

// Copy-on-write: row c of `copies` is (source block, target block, tokens), in every region.
struct CopyBlocks {
  const Region* regions;
  const std::int32_t* copies;
  Words words;
  Divider by_part;     // words of the largest region's block
  Divider by_regions;  // number of regions

  static CopyBlocks make(const Region* regions, std::int32_t num_regions,
                         const std::int32_t* copies, std::int32_t num_copies,
                         std::int64_t largest_block_bytes, int word_bytes) {
    const std::int64_t part = largest_block_bytes / word_bytes;
    return {regions,
            copies,
            {word_bytes, part * num_regions * num_copies},
            Divider(part),
            Divider(num_regions)};
  }

  KV_HD Move operator()(std::int64_t i) const {
    std::int64_t copy = by_part.split(i);
    std::int64_t r = copy;
    copy = by_regions.split(r);
    const Region& region = regions[r];
    const std::int32_t* row = copies + 3 * copy;
    const std::int64_t at = i * words.bytes;
    if (at >= row[2] * region.token_bytes || row[0] == row[1]) return {nullptr, nullptr};
    return {block_address(region, row[0]) + at, block_address(region, row[1]) + at};
  }
};

// New keys and values into their slots.
struct ScatterKv {
  ScatterPart parts[2];
  const std::int64_t* slots;
  Words words;
  Divider by_token;  // words of the larger part's token
  Divider by_parts;
  Divider by_block;  // block_size

  static ScatterKv make(const ScatterPart* parts, int num_parts, const std::int64_t* slots,
                        std::int64_t num_tokens, std::int32_t block_size) {
    ScatterKv kernel{};
    std::copy_n(parts, num_parts, kernel.parts);
    const auto [bytes, largest] = ScatterShape::of(parts, num_parts, num_tokens);
    kernel.slots = slots;
    kernel.words = {bytes, num_tokens * num_parts * (largest / bytes)};
    kernel.by_token = Divider(largest / bytes);
    kernel.by_parts = Divider(num_parts);
    kernel.by_block = Divider(block_size);
    return kernel;
  }

  KV_HD Move operator()(std::int64_t i) const {
    std::int64_t p = by_token.split(i);
    const std::int64_t token = by_parts.split(p);
    const ScatterPart& part = parts[p];
    const std::int64_t at = i * words.bytes;
    if (at >= part.region.token_bytes) return {nullptr, nullptr};
    std::int64_t offset = slots[token];
    const std::int64_t block = by_block.split(offset);
    return {part.source + token * part.source_stride + at,
            token_address(part.region, block, offset) + at};
  }
};

// Whole sequences, dense: target is [rows, num_heads, width, head_bytes], zeros past each row's
// tokens. Row b's blocks are table[b * table_stride + first_block ...].
struct GatherKv {
  Region region;
  const std::int32_t* table;
  std::int64_t table_stride;
  const std::int32_t* num_tokens;
  std::int64_t head_bytes;
  std::byte* target;
  Words words;
  Divider by_head;   // words of one head of one token
  Divider by_width;  // tokens
  Divider by_heads;
  Divider by_block;

  static GatherKv make(const Region& region, const TableView& view, std::int32_t first_block,
                       const std::int32_t* num_tokens, std::int32_t num_heads, std::int32_t width,
                       std::int32_t block_size, std::byte* target) {
    const std::int64_t head_bytes = region.token_bytes / num_heads;
    const int bytes = Alignment().with(region).with(head_bytes).with(target).word_bytes();
    const std::int64_t count = std::int64_t{view.num_rows} * num_heads * width * head_bytes / bytes;
    return {region,
            view.cells + first_block,
            view.stride,
            num_tokens,
            head_bytes,
            target,
            {bytes, count},
            Divider(head_bytes / bytes),
            Divider(width > 0 ? width : 1),
            Divider(num_heads),
            Divider(block_size)};
  }

  KV_HD Move operator()(std::int64_t i) const {
    std::byte* const to = target + i * words.bytes;
    std::int64_t position = by_head.split(i);
    std::int64_t head = by_width.split(position);
    const std::int64_t row = by_heads.split(head);
    if (position >= num_tokens[row]) return {nullptr, to};
    const std::int64_t block = table[row * table_stride + by_block.split(position)];
    return {token_address(region, block, position) + head * head_bytes + i * words.bytes, to};
  }
};

// Contiguous pieces, each up to `piece_bytes`: between device memory and pinned host memory, or
// inside of device memory.
struct TransferPiece {
  std::byte* to;
  const std::byte* from;
  std::int64_t bytes;
};

struct TransferBlocks {
  const TransferPiece* pieces;
  Words words;
  Divider by_piece;
  bool across_bus;  // then few threads saturate it, and the model keeps the rest

  static TransferBlocks make(const TransferPiece* pieces, std::int64_t num_pieces,
                             std::int64_t piece_bytes, int word_bytes, bool across_bus) {
    const std::int64_t part = piece_bytes / word_bytes;
    return {pieces, {word_bytes, part * num_pieces}, Divider(part > 0 ? part : 1), across_bus};
  }

  KV_HD Move operator()(std::int64_t i) const {
    const TransferPiece& piece = pieces[by_piece.split(i)];
    const std::int64_t at = i * words.bytes;
    if (at >= piece.bytes) return {nullptr, nullptr};
    return {piece.from + at, piece.to + at};
  }
};

// A step's changes to the device's copy of the block tables: update u writes cells
// [first, last) of a row, which stand one after another from cells[start] on.
struct TableCells {
  std::int32_t row;
  std::int32_t first;
  std::int32_t last;
  std::int32_t start;
};

struct UpdateTables {
  const TableCells* updates;
  const std::int32_t* cells;
  std::int32_t* tables;
  std::int64_t table_stride;
  Words words;
  Divider by_update;  // cells of the largest update

  static UpdateTables make(const TableCells* updates, std::int64_t num_updates,
                           std::int64_t most_cells, const std::int32_t* cells, std::int32_t* tables,
                           std::int64_t table_stride) {
    return {updates,
            cells,
            tables,
            table_stride,
            {sizeof(std::int32_t), num_updates * most_cells},
            Divider(most_cells > 0 ? most_cells : 1)};
  }

  KV_HD Move operator()(std::int64_t i) const {
    const TableCells& update = updates[by_update.split(i)];
    if (i >= update.last - update.first) return {nullptr, nullptr};
    return {reinterpret_cast<const std::byte*>(cells + update.start + i),
            reinterpret_cast<std::byte*>(tables + update.row * table_stride + update.first + i)};
  }
};

}  // namespace pagedkv
