#include "host/host_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/error.h"
#include "host/attend_row.h"
#include "host/parallel.h"

namespace pagedkv {

namespace {

// The first token that row b sees, as far as `firsts` says.
std::int64_t asked_first(const DecodeRows& rows, std::size_t b) {
  return rows.firsts == nullptr ? 0 : rows.firsts[b];
}

RowShape shape_of(const HostPool& pool, const TableView& table,
                  std::span<const std::int32_t> seq_lens, const DecodeRows& rows) {
  const std::size_t keys = 2 * rows.layer;
  pool.check_gather(keys, table, 0, seq_lens, rows.num_kv_heads, table.width * pool.block_size());
  const std::int64_t head_bytes = rows.num_kv_heads * (rows.type == FloatType::kFloat32 ? 4 : 2);
  const Region &first = pool.region(keys), &second = pool.region(keys + 1);
  const std::int64_t dim = first.token_bytes / head_bytes, other = second.token_bytes / head_bytes;
  if (dim % kLanes != 0 || other % kLanes != 0 || rows.group < 1 ||
      first.token_bytes % head_bytes != 0 || second.token_bytes % head_bytes != 0) {
    throw InvalidSpec("attend: expected heads of a multiple of 8 elements");
  }
  for (std::size_t b = 0; b < seq_lens.size(); ++b) {
    const std::int64_t begin = asked_first(rows, b);
    if (begin < 0 || begin >= seq_lens[b]) {
      throw InvalidSpec("attend: expected rows that see a token");
    }
  }
  return {.pool = pool,
          .keys = first,
          .beside = second,
          .values = rows.latent ? first : second,
          .k_dim = dim,
          .beside_dim = rows.latent ? other : 0,
          .v_dim = rows.latent ? dim : other,
          .block_size = pool.block_size(),
          .token_bytes = first.token_bytes + second.token_bytes};
}

constexpr std::int64_t kPieceBytes = 1 << 20;  // of keys and values: worth the waking of a thread

std::int64_t first_seen(const DecodeRows& rows, std::size_t b, std::int64_t length) {
  // Not before 0, whatever another thread has written there since they were checked.
  return std::max(
      {asked_first(rows, b), rows.window > 0 ? length - rows.window : 0, std::int64_t{0}});
}

// What threads take one by one: rows, and pieces of long ones.
struct Pieces {
  std::vector<Row> list;
  std::vector<std::size_t> begins;   // row b is list[begins[b]] up to list[begins[b + 1]]
  std::vector<float> outputs, sums;  // of pieces, before they are joined
  int num_threads = 1;
};

Pieces pieces_of(const RowShape& shape, const TableView& table,
                 std::span<const std::int32_t> seq_lens, const DecodeRows& rows, int num_threads) {
  const std::int64_t num_heads = std::int64_t{rows.num_kv_heads} * rows.group;
  const std::int64_t token_bytes = shape.token_bytes;
  std::int64_t total = 0;
  for (std::size_t b = 0; b < seq_lens.size(); ++b) {
    total += seq_lens[b] - first_seen(rows, b, seq_lens[b]);
  }
  Pieces pieces;
  pieces.num_threads = static_cast<int>(
      std::clamp<std::int64_t>(total * token_bytes / kPieceBytes, 1, std::max(num_threads, 1)));
  // Tokens of a piece: so few that threads end at about one time.
  std::int64_t most = std::numeric_limits<std::int64_t>::max();
  if (pieces.num_threads > 1) {
    most = std::max(total / (4 * pieces.num_threads), kPieceBytes / token_bytes / 2);
    most = (most / kPart + 1) * kPart;
  }

  for (std::int64_t b = 0; b < table.num_rows; ++b) {
    const auto i = static_cast<std::size_t>(b);
    const std::int64_t length = std::min<std::int64_t>(seq_lens[i], table.width * shape.block_size);
    Row row{
        .cells = table.cells + b * table.stride,
        .first = first_seen(rows, i, length),
        .end = length,
        .queries = rows.queries + b * num_heads * shape.query_dim(),
        .outputs = rows.outputs + b * num_heads * shape.v_dim,
        .sums = rows.sums == nullptr ? nullptr : rows.sums + b * num_heads,
    };
    pieces.begins.push_back(pieces.list.size());
    if (length - row.first > most) row.outputs = nullptr;  // its pieces get their own, below
    for (; length - row.first > most; row.first += most) {
      pieces.list.push_back(row);
      pieces.list.back().end = row.first + most;
    }
    pieces.list.push_back(row);
  }
  pieces.begins.push_back(pieces.list.size());

  const auto num_partial = static_cast<std::size_t>(std::ranges::count_if(
      pieces.list, [](const Row& piece) { return piece.outputs == nullptr; }));
  pieces.outputs.resize(num_partial * static_cast<std::size_t>(num_heads * shape.v_dim));
  pieces.sums.resize(num_partial * static_cast<std::size_t>(num_heads));
  float *outputs = pieces.outputs.data(), *sums = pieces.sums.data();
  for (Row& piece : pieces.list) {
    if (piece.outputs != nullptr) continue;
    piece.outputs = outputs;
    piece.sums = sums;
    outputs += num_heads * shape.v_dim;
    sums += num_heads;
  }
  return pieces;
}

// What the pieces of row `b` give together, by the log-sum-exp of each.
void join(std::span<const Row> pieces, const DecodeRows& rows, std::int64_t b, std::int64_t v_dim) {
  const std::int64_t num_heads = std::int64_t{rows.num_kv_heads} * rows.group;
  for (std::int64_t h = 0; h < num_heads; ++h) {
    float largest = -std::numeric_limits<float>::infinity(), total = 0;
    for (const Row& piece : pieces) largest = std::max(largest, piece.sums[h]);
    float* const to = rows.outputs + (b * num_heads + h) * v_dim;
    std::fill(to, to + v_dim, 0.0f);
    const bool none = largest == -std::numeric_limits<float>::infinity();
    for (const Row& piece : pieces) {
      const float weight = none ? 0 : std::exp(piece.sums[h] - largest);
      if (weight == 0) continue;  // its output may be that of no key at all
      total += weight;
      for (std::int64_t d = 0; d < v_dim; ++d) to[d] += weight * piece.outputs[h * v_dim + d];
    }
    for (std::int64_t d = 0; d < v_dim; ++d) to[d] /= total;
    if (rows.sums != nullptr) rows.sums[b * num_heads + h] = largest + std::log(total);
  }
}

void attend_by(AttendRow attend_row, const HostPool& pool, const TableView& table,
               std::span<const std::int32_t> seq_lens, const DecodeRows& rows, int num_threads) {
  const RowShape shape = shape_of(pool, table, seq_lens, rows);
  const Pieces pieces = pieces_of(shape, table, seq_lens, rows, num_threads);
  std::vector<RowSpace> spaces;
  for (int i = 0; i < pieces.num_threads; ++i) {
    spaces.emplace_back(shape, std::int64_t{rows.num_kv_heads} * rows.group);
  }
  parallel_for(pieces.num_threads, std::ssize(pieces.list), [&](std::int64_t i, int thread) {
    attend_row(shape, pieces.list[static_cast<std::size_t>(i)], rows,
               spaces[static_cast<std::size_t>(thread)]);
  });
  const std::span<const Row> list = pieces.list;
  for (std::size_t b = 0; b + 1 < pieces.begins.size(); ++b) {
    const std::size_t begin = pieces.begins[b], count = pieces.begins[b + 1] - begin;
    if (count > 1) join(list.subspan(begin, count), rows, std::int64_t(b), shape.v_dim);
  }
}

}  // namespace

void attend(const HostPool& pool, const TableView& table, std::span<const std::int32_t> seq_lens,
            const DecodeRows& rows, int num_threads) {
  attend_by(fastest_attend_row(rows.type), pool, table, seq_lens, rows, num_threads);
}

void attend_portably(const HostPool& pool, const TableView& table,
                     std::span<const std::int32_t> seq_lens, const DecodeRows& rows,
                     int num_threads) {
  attend_by(portable_attend_row(rows.type), pool, table, seq_lens, rows, num_threads);
}

}  // namespace pagedkv
