// Attention of one new token per row, straight off the blocks: how a CPU decodes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "host/host_pool.h"

namespace pagedkv {

enum class FloatType { kFloat32, kBFloat16 };

// Rows of one new token each, in one layer.
struct DecodeRows {
  std::size_t layer;
  FloatType type;  // of keys and values
  // A key is what both regions have, one behind the other, and a value what the first has.
  bool latent;
  std::int32_t num_kv_heads;
  std::int32_t group;   // query heads for each KV head
  float scale;          // of scores
  float softcap;        // scores become softcap * tanh(scores / softcap); 0: they stay
  std::int32_t window;  // a token sees itself and the window - 1 before it; 0: all
  // Nor does row b see the tokens before firsts[b]; null: each sees its sequence from its
  // beginning.
  const std::int32_t* firsts;
  const float* queries;  // [rows, num_kv_heads * group, elements of a key]
  float* outputs;        // [rows, num_kv_heads * group, elements of a value]
  float* sums;           // log-sum-exp of the scores, [rows, num_kv_heads * group]; may be null
};

// Row b is table's row b, seq_lens[b] tokens long with the new one, which is in its block and which
// it sees. Heads have to be of a multiple of 8 elements in both regions. On up to num_threads
// threads, as far as there is work for them: long rows are read in pieces. InvalidSpec, before
// anything is written, for a block outside the pool.
void attend(const HostPool& pool, const TableView& table, std::span<const std::int32_t> seq_lens,
            const DecodeRows& rows, int num_threads = 1);

// The same by what every machine has: attend() itself takes more where that is there.
void attend_portably(const HostPool& pool, const TableView& table,
                     std::span<const std::int32_t> seq_lens, const DecodeRows& rows,
                     int num_threads = 1);

}  // namespace pagedkv
