// Attention of one row's new token, on one thread.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "host/host_attention.h"

namespace pagedkv {

// All dims are multiples of this.
inline constexpr std::int64_t kLanes = 8;

// Tokens whose scores are kept at a time: softmax runs on over the parts of a sequence, as in
// Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).
inline constexpr std::int64_t kPart = 256;
inline constexpr std::int64_t kScores = kPart + kLanes;  // from one query's scores to the next's

struct RowShape {
  const HostPool& pool;
  Region keys, beside, values;  // beside: the rest of each key, if beside_dim is not 0
  std::int64_t k_dim, beside_dim, v_dim;
  std::int64_t block_size, token_bytes;

  std::int64_t query_dim() const { return k_dim + beside_dim; }
};

// A row's table, the tokens [first, end) that it sees, and its part of what DecodeRows says.
struct Row {
  const std::int32_t* cells;
  std::int64_t first, end;
  const float* queries;
  float *outputs, *sums;
};

// Of one query head: the largest score so far, and the sum of e ** (score - largest).
struct Norm {
  float largest = -std::numeric_limits<float>::infinity();
  float sum = 0;
};

// What a thread works in.
struct RowSpace {
  RowSpace(const RowShape& shape, std::int64_t num_heads);

  std::vector<float> scores;  // [query heads, kScores]
  std::vector<float> tile;    // [block_size, the largest dim]
  std::vector<Norm> norms;    // [query heads]
};

using AttendRow = void (*)(const RowShape& shape, const Row& row, const DecodeRows& rows,
                           RowSpace& space);

// By the best that this machine has, and by what every machine has.
AttendRow fastest_attend_row(FloatType type);
AttendRow portable_attend_row(FloatType type);

}  // namespace pagedkv
