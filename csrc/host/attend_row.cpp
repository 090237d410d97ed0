#include "host/attend_row.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

// All of a row's work is compiled into the functions at the end, each for an instruction set.
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

using Floats = float __attribute__((vector_size(kLanes * 4)));
using HalfFloats = float __attribute__((vector_size(kLanes * 2)));
using Words = std::uint32_t __attribute__((vector_size(kLanes * 4)));
using Halves = std::uint16_t __attribute__((vector_size(kLanes * 2)));

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

// Scores of `count` keys for kNum queries, `query_dim` apart, whose scores are kScores apart. Four
// keys at a time, each read once for all queries. kAdds: they are of the rest of the keys, and are
// added to the scores that are there; else up to 3 floats behind them are overwritten.
template <int kNum, bool kAdds>
KV_INLINE void score(const float* queries, std::int64_t query_dim, const Tile& keys,
                     std::int64_t count, std::int64_t dim, float* scores) {
  for (std::int64_t t = 0; t < count; t += 4) {
    const float* k[4];
    for (std::int64_t i = 0; i < 4; ++i) k[i] = keys.at + std::min(t + i, count - 1) * keys.stride;
    Floats sums[kNum][4] = {};
    for (std::int64_t d = 0; d < dim; d += kLanes) {
      Floats q[kNum], x;
      for (int n = 0; n < kNum; ++n) load(queries + n * query_dim + d, q[n]);
      for (int i = 0; i < 4; ++i) {
        load(k[i] + d, x);
        for (int n = 0; n < kNum; ++n) sums[n][i] += q[n] * x;
      }
    }
    for (int n = 0; n < kNum; ++n) {
      float* const to = scores + n * kScores + t;
      if constexpr (kAdds) {
        float rest[4];
        store_sums(sums[n], rest);
        for (std::int64_t i = 0; i < std::min<std::int64_t>(4, count - t); ++i) to[i] += rest[i];
      } else {
        store_sums(sums[n], to);
      }
    }
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

// e ** x of each lane, for x <= 0, and 0 where that is no normal number: 2 ** n times a polynomial,
// by Cephes' coefficients.
KV_INLINE void exponentiate(Floats& x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2 ** 23: adding it rounds to an integer
  const auto vanishes = x < -87.0f;
  x = vanishes ? Floats{} : x;
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
  x = vanishes ? Floats{} : p * power;
}

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
  if (largest == -std::numeric_limits<float>::infinity()) {  // nothing is seen, or NaN alone
    for (std::int64_t t = 0; t < padded; t += kLanes) {
      load(scores + t, x);
      total += x != x ? x : Floats{};
    }
    for (int i = 0; i < kLanes; ++i) norm.sum += total[i];
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
KV_INLINE void each_tile(const HostPool& pool, const Region& region, const std::int32_t* cells,
                         std::int64_t block_size, std::int64_t num_heads, std::int64_t begin,
                         std::int64_t end, std::int64_t dim, RowSpace& space, F&& use) {
  for (std::int64_t at = begin; at < end;) {
    const std::int64_t offset = at % block_size, count = std::min(block_size - offset, end - at);
    const std::byte* head =
        region.base + pool.bounded(cells[at / block_size]) * region.block_stride;
    head += offset * region.token_bytes;
    for (std::int64_t h = 0; h < num_heads; ++h, head += region.token_bytes / num_heads) {
      use(tile_of<kType>(head, region.token_bytes, count, dim, space.tile.data()), at - begin,
          count, h);
    }
    at += count;
  }
}

template <FloatType kType>
KV_INLINE void attend_row(const RowShape& shape, const Row& row, const DecodeRows& rows,
                          RowSpace& space) {
  const float* const queries = row.queries;
  float* const outputs = row.outputs;
  const std::int64_t heads = rows.num_kv_heads, group = rows.group;
  const std::int64_t query_dim = shape.query_dim(), v_dim = shape.v_dim;
  float* const scores = space.scores.data();
  std::fill(outputs, outputs + heads * group * v_dim, 0.0f);
  std::fill(space.norms.begin(), space.norms.end(), Norm{});
  for (std::int64_t begin = row.first; begin < row.end; begin += kPart) {
    const std::int64_t end = std::min(begin + kPart, row.end);
    // The scores that one region of the keys gives, whose part of a query begins at `first`.
    const auto score_region = [&](const Region& region, std::int64_t first, std::int64_t dim,
                                  auto adds) KV_LAMBDA {
      const auto score_keys = [&](const Tile& keys, std::int64_t place, std::int64_t count,
                                  std::int64_t h) KV_LAMBDA {
        by_two(h * group, group, [&](std::int64_t i, auto num) KV_LAMBDA {
          score<num, decltype(adds)::value>(queries + i * query_dim + first, query_dim, keys, count,
                                            dim, scores + i * kScores + place);
        });
      };
      each_tile<kType>(shape.pool, region, row.cells, shape.block_size, heads, begin, end, dim,
                       space, score_keys);
    };
    const auto add_values = [&](const Tile& values, std::int64_t place, std::int64_t count,
                                std::int64_t h) KV_LAMBDA {
      by_two(h * group, group, [&](std::int64_t i, auto num) KV_LAMBDA {
        add<num>(scores + i * kScores + place, values, count, v_dim, outputs + i * v_dim);
      });
    };
    score_region(shape.keys, 0, shape.k_dim, std::false_type{});
    if (shape.beside_dim != 0) {
      score_region(shape.beside, shape.k_dim, shape.beside_dim, std::true_type{});
    }
    for (std::int64_t i = 0; i < heads * group; ++i) {
      normalize(scores + i * kScores, end - begin, rows, space.norms[static_cast<std::size_t>(i)],
                outputs + i * v_dim, v_dim);
    }
    each_tile<kType>(shape.pool, shape.values, row.cells, shape.block_size, heads, begin, end,
                     v_dim, space, add_values);
  }
  for (std::int64_t i = 0; i < heads * group; ++i) {
    const float sum = space.norms[static_cast<std::size_t>(i)].sum;
    for (std::int64_t d = 0; d < v_dim; ++d) outputs[i * v_dim + d] /= sum;
    if (row.sums != nullptr) {
      row.sums[i] = space.norms[static_cast<std::size_t>(i)].largest + std::log(sum);
    }
  }
}

#if defined(__x86_64__)
template <FloatType kType>
[[gnu::target("avx2,fma")]] void attend_row_avx2(const RowShape& shape, const Row& row,
                                                 const DecodeRows& rows, RowSpace& space) {
  attend_row<kType>(shape, row, rows, space);
}
#endif

template <FloatType kType>
void attend_row_anywhere(const RowShape& shape, const Row& row, const DecodeRows& rows,
                         RowSpace& space) {
  attend_row<kType>(shape, row, rows, space);
}

}  // namespace

RowSpace::RowSpace(const RowShape& shape, std::int64_t num_heads)
    : scores(static_cast<std::size_t>(num_heads * kScores)),
      tile(static_cast<std::size_t>(shape.block_size *
                                    std::max({shape.k_dim, shape.beside_dim, shape.v_dim}))),
      norms(static_cast<std::size_t>(num_heads)) {}

AttendRow portable_attend_row(FloatType type) {
  return type == FloatType::kFloat32 ? &attend_row_anywhere<FloatType::kFloat32>
                                     : &attend_row_anywhere<FloatType::kBFloat16>;
}

AttendRow fastest_attend_row(FloatType type) {
#if defined(__x86_64__)
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx2) {
    return type == FloatType::kFloat32 ? &attend_row_avx2<FloatType::kFloat32>
                                       : &attend_row_avx2<FloatType::kBFloat16>;
  }
#endif
  return portable_attend_row(type);
}

}  // namespace pagedkv
