#include "host/host_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <type_traits>
#include <vector>

// All of a row's work is compiled into the two functions at the end, each for an instruction set.
#define KV_INLINE [[gnu::always_inline]] inline
#define KV_LAMBDA __attribute__((always_inline))

// Lanes of two vectors: GCC has clang's name for it from version 12 on only.
#if defined(__clang__)
#define KV_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define KV_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Words{__VA_ARGS__})
#endif

namespace pagedkv {

namespace {

constexpr std::int64_t kLanes = 8;
using Floats = float __attribute__((vector_size(kLanes * 4)));
using HalfFloats = float __attribute__((vector_size(kLanes * 2)));
using Words = std::uint32_t __attribute__((vector_size(kLanes * 4)));
using Halves = std::uint16_t __attribute__((vector_size(kLanes * 2)));

// Tokens whose scores are kept at a time: softmax runs on over the parts of a sequence, as in
// Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).
constexpr std::int64_t kPart = 256;
constexpr std::int64_t kScores = kPart + kLanes;  // floats from one query's scores to the next's

KV_INLINE void load(const float* from, Floats& to) { std::memcpy(&to, from, sizeof to); }
KV_INLINE void store(float* to, const Floats& from) { std::memcpy(to, &from, sizeof from); }

// Keys or values of one head in one block: token t at `at` + t * stride, in float.
struct Tile {
  const float* at;
  std::int64_t stride;  // in floats
};

// A tile of `count` tokens, converted into `space` where that is needed.
template <FloatType kType>
KV_INLINE Tile tile_of(const std::byte* from, std::int64_t token_bytes, std::int64_t count,
                       std::int64_t dim, float* space) {
  if constexpr (kType == FloatType::kFloat32) {
    return {reinterpret_cast<const float*>(from), token_bytes / 4};
  } else {
    for (std::int64_t t = 0; t < count; ++t, from += token_bytes) {
      for (std::int64_t d = 0; d < dim; d += kLanes) {
        Halves halves;
        std::memcpy(&halves, from + 2 * d, sizeof halves);
        const Words words = __builtin_convertvector(halves, Words) << 16;
        std::memcpy(space + t * dim + d, &words, sizeof words);
      }
    }
    return {space, dim};
  }
}

// The sums of four vectors' lanes.
KV_INLINE void store_sums(const Floats (&s)[4], float* to) {
  const Floats ab = KV_SHUFFLE(s[0], s[1], 0, 8, 2, 10, 4, 12, 6, 14) +
                    KV_SHUFFLE(s[0], s[1], 1, 9, 3, 11, 5, 13, 7, 15);
  const Floats cd = KV_SHUFFLE(s[2], s[3], 0, 8, 2, 10, 4, 12, 6, 14) +
                    KV_SHUFFLE(s[2], s[3], 1, 9, 3, 11, 5, 13, 7, 15);
  const Floats sums =
      KV_SHUFFLE(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) + KV_SHUFFLE(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
  HalfFloats halves[2];
  std::memcpy(halves, &sums, sizeof halves);
  halves[0] += halves[1];
  std::memcpy(to, halves, sizeof halves[0]);
}

// Scores of `count` keys for kNum queries, k_dim apart, whose scores are kScores apart; up to 3
// floats behind them are overwritten. Four keys at a time, each read once for all queries.
template <int kNum>
KV_INLINE void score(const float* queries, const Tile& keys, std::int64_t count, std::int64_t dim,
                     float* scores) {
  for (std::int64_t t = 0; t < count; t += 4) {
    const float* k[4];
    for (std::int64_t i = 0; i < 4; ++i) k[i] = keys.at + std::min(t + i, count - 1) * keys.stride;
    Floats sums[kNum][4] = {};
    for (std::int64_t d = 0; d < dim; d += kLanes) {
      Floats q[kNum], x;
      for (int n = 0; n < kNum; ++n) load(queries + n * dim + d, q[n]);
      for (int i = 0; i < 4; ++i) {
        load(k[i] + d, x);
        for (int n = 0; n < kNum; ++n) sums[n][i] += q[n] * x;
      }
    }
    for (int n = 0; n < kNum; ++n) store_sums(sums[n], scores + n * kScores + t);
  }
}

// sums[n][d] += column d of the values, weighted for query n; kVectors vectors of columns.
template <int kNum, int kVectors>
KV_INLINE void add_columns(const float* weights, const float* at, std::int64_t stride,
                           std::int64_t count, float* sums, std::int64_t dim) {
  Floats s[kNum][kVectors], x;
  for (int n = 0; n < kNum; ++n) {
    for (int j = 0; j < kVectors; ++j) load(sums + n * dim + j * kLanes, s[n][j]);
  }
  for (std::int64_t t = 0; t < count; ++t, at += stride) {
    for (int j = 0; j < kVectors; ++j) {
      load(at + j * kLanes, x);
      for (int n = 0; n < kNum; ++n) s[n][j] += weights[n * kScores + t] * x;
    }
  }
  for (int n = 0; n < kNum; ++n) {
    for (int j = 0; j < kVectors; ++j) store(sums + n * dim + j * kLanes, s[n][j]);
  }
}

template <int kNum>
KV_INLINE void add(const float* weights, const Tile& values, std::int64_t count, std::int64_t dim,
                   float* sums) {
  constexpr int kVectors = 8 / kNum;  // so that all sums stay in registers
  std::int64_t d = 0;
  for (; d + kVectors * kLanes <= dim; d += kVectors * kLanes) {
    add_columns<kNum, kVectors>(weights, values.at + d, values.stride, count, sums + d, dim);
  }
  for (; d < dim; d += kLanes) {
    add_columns<kNum, 1>(weights, values.at + d, values.stride, count, sums + d, dim);
  }
}

// e ** x of each lane, for x <= 0: 2 ** n times a polynomial, by Cephes' coefficients.
KV_INLINE void exponentiate(Floats& x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2 ** 23: adding it rounds to an integer
  x = x < -87.0f ? Floats{} - 87.0f : x;
  const Floats shifted = x * 1.44269504f + kRound;
  const Floats n = shifted - kRound;
  const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  Words bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;
  Floats power;
  std::memcpy(&power, &bits, sizeof power);
  x = p * power;
}

// Of one query head: the largest score so far, and the sum of e ** (score - largest).
struct Norm {
  float largest = -std::numeric_limits<float>::infinity();
  float sum = 0;
};

// Scores become weights relative to the largest so far; what was summed before is scaled to it.
KV_INLINE void normalize(float* scores, std::int64_t count, const DecodeRows& rows, Norm& norm,
                         float* sums, std::int64_t dim) {
  for (std::int64_t t = 0; t < count; ++t) scores[t] *= rows.scale;
  if (rows.softcap > 0) {
    for (std::int64_t t = 0; t < count; ++t) {
      scores[t] = rows.softcap * std::tanh(scores[t] / rows.softcap);
    }
  }
  const std::int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
  std::fill(scores + count, scores + padded, -std::numeric_limits<float>::infinity());
  Floats x, highest = Floats{} - std::numeric_limits<float>::infinity(), total = {};
  for (std::int64_t t = 0; t < padded; t += kLanes) {
    load(scores + t, x);
    highest = x > highest ? x : highest;
  }
  float largest = norm.largest;
  for (int i = 0; i < kLanes; ++i) largest = std::max(largest, highest[i]);
  if (largest == -std::numeric_limits<float>::infinity()) {  // so far nothing is seen at all
    std::fill(scores, scores + count, 0.0f);
    return;
  }
  const float factor = std::exp(norm.largest - largest);
  if (factor != 1) {
    for (std::int64_t d = 0; d < dim; ++d) sums[d] *= factor;
  }
  for (std::int64_t t = 0; t < padded; t += kLanes) {
    load(scores + t, x);
    x -= largest;
    exponentiate(x);
    store(scores + t, x);
    total += x;
  }
  norm.largest = largest;
  norm.sum *= factor;
  for (int i = 0; i < kLanes; ++i) norm.sum += total[i];
}

// What a call works in.
struct Space {
  std::vector<float> scores;  // [query heads, kPart + a vector]
  std::vector<float> tile;    // [block_size, the larger dim]
  std::vector<Norm> norms;    // [query heads]
};

struct Shape {
  Region keys, values;
  std::int64_t block_size, k_dim, v_dim;
};

// Calls work(first query, its number as a type) for a KV head's queries, two at a time.
template <class F>
KV_INLINE void by_two(std::int64_t first, std::int64_t count, F&& work) {
  const std::int64_t end = first + count;
  for (; first + 2 <= end; first += 2) work(first, std::integral_constant<int, 2>{});
  if (first < end) work(first, std::integral_constant<int, 1>{});
}

// Calls use(tile, place of its first token behind `begin`, number of tokens, KV head) for each head
// of each block of a row's tokens [begin, end), in the order of memory.
template <FloatType kType, class F>
KV_INLINE void each_tile(const Region& region, const std::int32_t* cells, std::int64_t block_size,
                         std::int64_t num_heads, std::int64_t begin, std::int64_t end,
                         std::int64_t dim, Space& space, F&& use) {
  for (std::int64_t at = begin; at < end;) {
    const std::int64_t offset = at % block_size, count = std::min(block_size - offset, end - at);
    const std::byte* head = region.base + cells[at / block_size] * region.block_stride;
    head += offset * region.token_bytes;
    for (std::int64_t h = 0; h < num_heads; ++h, head += region.token_bytes / num_heads) {
      use(tile_of<kType>(head, region.token_bytes, count, dim, space.tile.data()), at - begin,
          count, h);
    }
    at += count;
  }
}

// One row, of which the tokens [first, length) are seen.
template <FloatType kType>
KV_INLINE void attend_row(const Shape& shape, const std::int32_t* cells, std::int64_t first,
                          std::int64_t length, const DecodeRows& rows, const float* queries,
                          float* outputs, float* sums, Space& space) {
  const std::int64_t heads = rows.num_kv_heads, group = rows.group;
  const std::int64_t k_dim = shape.k_dim, v_dim = shape.v_dim;
  float* const scores = space.scores.data();
  std::fill(outputs, outputs + heads * group * v_dim, 0.0f);
  std::fill(space.norms.begin(), space.norms.end(), Norm{});
  for (std::int64_t begin = first; begin < length; begin += kPart) {
    const std::int64_t end = std::min(begin + kPart, length);
    const auto score_keys = [&](const Tile& keys, std::int64_t place, std::int64_t count,
                                std::int64_t h) KV_LAMBDA {
      by_two(h * group, group, [&](std::int64_t i, auto num) KV_LAMBDA {
        score<num>(queries + i * k_dim, keys, count, k_dim, scores + i * kScores + place);
      });
    };
    const auto add_values = [&](const Tile& values, std::int64_t place, std::int64_t count,
                                std::int64_t h) KV_LAMBDA {
      by_two(h * group, group, [&](std::int64_t i, auto num) KV_LAMBDA {
        add<num>(scores + i * kScores + place, values, count, v_dim, outputs + i * v_dim);
      });
    };
    each_tile<kType>(shape.keys, cells, shape.block_size, heads, begin, end, k_dim, space,
                     score_keys);
    for (std::int64_t i = 0; i < heads * group; ++i) {
      normalize(scores + i * kScores, end - begin, rows, space.norms[static_cast<std::size_t>(i)],
                outputs + i * v_dim, v_dim);
    }
    each_tile<kType>(shape.values, cells, shape.block_size, heads, begin, end, v_dim, space,
                     add_values);
  }
  for (std::int64_t i = 0; i < heads * group; ++i) {
    const float sum = space.norms[static_cast<std::size_t>(i)].sum;
    for (std::int64_t d = 0; d < v_dim; ++d) outputs[i * v_dim + d] /= sum;
    if (sums != nullptr) {
      sums[i] = space.norms[static_cast<std::size_t>(i)].largest + std::log(sum);
    }
  }
}

template <FloatType kType>
KV_INLINE void attend_rows(const Shape& shape, const TableView& table,
                           std::span<const std::int32_t> seq_lens, const DecodeRows& rows,
                           Space& space) {
  const std::int64_t num_heads = std::int64_t{rows.num_kv_heads} * rows.group;
  for (std::int64_t b = 0; b < table.num_rows; ++b) {
    const std::int64_t length = seq_lens[static_cast<std::size_t>(b)];
    const std::int64_t first =
        std::max<std::int64_t>(rows.first, rows.window > 0 ? length - rows.window : 0);
    attend_row<kType>(shape, table.cells + b * table.stride, first, length, rows,
                      rows.queries + b * num_heads * shape.k_dim,
                      rows.outputs + b * num_heads * shape.v_dim,
                      rows.sums == nullptr ? nullptr : rows.sums + b * num_heads, space);
  }
}

KV_INLINE void attend_rows(const Shape& shape, const TableView& table,
                           std::span<const std::int32_t> seq_lens, const DecodeRows& rows,
                           Space& space) {
  rows.type == FloatType::kFloat32
      ? attend_rows<FloatType::kFloat32>(shape, table, seq_lens, rows, space)
      : attend_rows<FloatType::kBFloat16>(shape, table, seq_lens, rows, space);
}

#if defined(__x86_64__)
[[gnu::target("avx2,fma")]] void attend_avx2(const Shape& shape, const TableView& table,
                                             std::span<const std::int32_t> seq_lens,
                                             const DecodeRows& rows, Space& space) {
  attend_rows(shape, table, seq_lens, rows, space);
}
#endif

void attend_anywhere(const Shape& shape, const TableView& table,
                     std::span<const std::int32_t> seq_lens, const DecodeRows& rows, Space& space) {
  attend_rows(shape, table, seq_lens, rows, space);
}

decltype(&attend_anywhere) fastest() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &attend_avx2;
#endif
  return &attend_anywhere;
}

void check_and_run(decltype(&attend_anywhere) run, const HostPool& pool, const TableView& table,
                   std::span<const std::int32_t> seq_lens, const DecodeRows& rows) {
  const std::size_t keys = 2 * rows.layer;
  pool.check_gather(keys, table, 0, seq_lens, rows.num_kv_heads, table.width * pool.block_size());
  const std::int64_t head_bytes = rows.num_kv_heads * (rows.type == FloatType::kFloat32 ? 4 : 2);
  Shape shape{pool.region(keys), pool.region(keys + 1), pool.block_size(), 0, 0};
  shape.k_dim = shape.keys.token_bytes / head_bytes;
  shape.v_dim = shape.values.token_bytes / head_bytes;
  if (shape.k_dim % kLanes != 0 || shape.v_dim % kLanes != 0 || rows.group < 1 ||
      shape.keys.token_bytes % head_bytes != 0 || shape.values.token_bytes % head_bytes != 0) {
    throw std::invalid_argument("attend: expected heads of a multiple of 8 elements");
  }
  const bool all_see = std::ranges::all_of(seq_lens, [&](auto n) { return n > rows.first; });
  if (rows.first < 0 || !all_see) {
    throw std::invalid_argument("attend: expected sequences that are longer than what is left out");
  }
  const auto num_heads = static_cast<std::size_t>(rows.num_kv_heads * rows.group);
  const auto tile = static_cast<std::size_t>(shape.block_size * std::max(shape.k_dim, shape.v_dim));
  Space space{std::vector<float>(num_heads * kScores), std::vector<float>(tile),
              std::vector<Norm>(num_heads)};
  run(shape, table, seq_lens, rows, space);
}

}  // namespace

void attend(const HostPool& pool, const TableView& table, std::span<const std::int32_t> seq_lens,
            const DecodeRows& rows) {
  static const auto run = fastest();
  check_and_run(run, pool, table, seq_lens, rows);
}

void attend_portably(const HostPool& pool, const TableView& table,
                     std::span<const std::int32_t> seq_lens, const DecodeRows& rows) {
  check_and_run(&attend_anywhere, pool, table, seq_lens, rows);
}

}  // namespace pagedkv
