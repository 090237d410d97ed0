// The kernels' words, moved on the CPU in a random order, against the host pool. All memory is
// compared, so a word too many is noticed like one too few.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "cuda/kernels.h"
#include "host/host_pool.h"

using namespace pagedkv;

namespace {

template <class Kernel>
void run(const Kernel& kernel, std::mt19937& random) {
  std::vector<std::int64_t> order(static_cast<std::size_t>(kernel.words.count));
  std::iota(order.begin(), order.end(), 0);
  std::ranges::shuffle(order, random);
  for (const std::int64_t i : order) {
    const Move move = kernel(i);
    if (move.to == nullptr) continue;
    CHECK(reinterpret_cast<std::uintptr_t>(move.to) % kernel.words.bytes == 0);
    CHECK(reinterpret_cast<std::uintptr_t>(move.from) % kernel.words.bytes == 0);
    if (move.from == nullptr) {
      std::memset(move.to, 0, static_cast<std::size_t>(kernel.words.bytes));
    } else {
      std::memcpy(move.to, move.from, static_cast<std::size_t>(kernel.words.bytes));
    }
  }
}

std::vector<std::byte> noise(std::size_t bytes, std::mt19937& random) {
  std::vector<std::byte> memory(bytes);
  for (std::byte& b : memory) b = static_cast<std::byte>(random());
  return memory;
}

// Two pools of the same content: one for a kernel, one for the host pool, in one of two layouts.
struct Pools {
  static constexpr std::int32_t kBlocks = 9;
  std::int32_t block_size;
  std::vector<std::int64_t> token_bytes;
  std::vector<std::byte> memory;
  std::vector<std::byte> expected;

  Pools(std::int32_t size, std::vector<std::int64_t> bytes, std::mt19937& random)
      : block_size(size), token_bytes(std::move(bytes)) {
    const std::int64_t all =
        std::accumulate(token_bytes.begin(), token_bytes.end(), std::int64_t{0});
    memory = noise(static_cast<std::size_t>(all * block_size * kBlocks + 64), random);
    expected = memory;
  }

  std::vector<Region> regions(std::vector<std::byte>& in, bool block_major) const {
    std::byte* const base =
        reinterpret_cast<std::byte*>((reinterpret_cast<std::uintptr_t>(in.data()) + 63) / 64 * 64);
    const std::int64_t all =
        std::accumulate(token_bytes.begin(), token_bytes.end(), std::int64_t{0});
    std::vector<Region> list;
    std::int64_t before = 0;
    for (const std::int64_t bytes : token_bytes) {
      if (block_major) {
        list.push_back({base + before * block_size, all * block_size, bytes});
      } else {
        list.push_back({base + before * block_size * kBlocks, bytes * block_size, bytes});
      }
      before += bytes;
    }
    return list;
  }
};

template <class Test>
void for_each_shape(const Test& test) {
  std::mt19937 random(7);
  for (const std::int32_t block_size : {1, 3, 16}) {
    for (const std::vector<std::int64_t>& token_bytes : std::vector<std::vector<std::int64_t>>{
             {64, 64}, {256, 128, 256, 128}, {24, 40}, {2, 6}, {7}}) {
      for (const bool block_major : {true, false}) {
        CAPTURE(block_size);
        CAPTURE(token_bytes[0]);
        CAPTURE(block_major);
        Pools pools(block_size, token_bytes, random);
        // The two memories may be aligned differently: compare relative to the regions' start.
        const auto mine = pools.regions(pools.memory, block_major);
        const auto other = pools.regions(pools.expected, block_major);
        const std::size_t size = pools.memory.size() - 64;
        std::memcpy(other[0].base, mine[0].base, size);
        HostPool host(other, Pools::kBlocks, block_size);
        test(mine, host, random);
        CHECK(std::memcmp(other[0].base, mine[0].base, size) == 0);
      }
    }
  }
}

std::int32_t below(std::mt19937& random, std::int32_t n) {
  return static_cast<std::int32_t>(random() % static_cast<unsigned>(n));
}

int word_bytes(const std::vector<Region>& regions) {
  Alignment all;
  for (const Region& r : regions) all.with(r);
  return all.word_bytes();
}

std::int64_t largest(const std::vector<Region>& regions, std::int32_t block_size) {
  std::int64_t bytes = 0;
  for (const Region& r : regions) bytes = std::max(bytes, r.token_bytes * block_size);
  return bytes;
}

}  // namespace

TEST_CASE("a divider divides, at every edge") {
  std::vector<std::int64_t> numbers{0, 1, 2, 3, 5, 7, 10, 15, 16, 17, 63, 64, 65, 1000, 65535};
  for (int bit = 16; bit < 63; ++bit) {
    for (const std::int64_t near : {-1, 0, 1}) numbers.push_back((std::int64_t{1} << bit) + near);
  }
  numbers.push_back(std::numeric_limits<std::int64_t>::max());
  for (const std::int64_t d : numbers) {
    if (d == 0) continue;
    const Divider divider(d);
    for (const std::int64_t base : numbers) {
      for (const std::int64_t n :
           {base, base / d * d, std::max<std::int64_t>(base / d * d - 1, 0)}) {
        std::int64_t rest = n;
        CAPTURE(n);
        CAPTURE(d);
        CHECK(divider.split(rest) == n / d);
        CHECK(rest == n % d);
      }
    }
  }
}

TEST_CASE("words are as wide as everything allows") {
  CHECK(Alignment().with(32).with(48).word_bytes() == 16);
  CHECK(Alignment().with(32).with(24).word_bytes() == 8);
  CHECK(Alignment().with(4).word_bytes() == 4);
  CHECK(Alignment().with(reinterpret_cast<const void*>(0x1002)).word_bytes() == 2);
  CHECK(Alignment().with(Region{nullptr, 64, 7}).word_bytes() == 1);
}

TEST_CASE("addresses go past 2^31 elements") {
  std::byte* const base = reinterpret_cast<std::byte*>(std::uintptr_t{1} << 40);
  const Region region{base, std::int64_t{1} << 21, 2048};
  const std::int64_t block = 3'000'000;  // 6 TB further on
  CHECK(token_address(region, block, 5) == base + (block << 21) + 5 * 2048);
  const std::int64_t slot = block * 16 + 5;
  const ScatterPart part{region, base, 2048};
  const ScatterKv scatter = ScatterKv::make(&part, 1, &slot, 1, 16);
  CHECK(scatter(127).to == base + (block << 21) + 5 * 2048 + 127 * 16);
  const TransferPiece piece{base, base + 1, std::int64_t{1} << 36};
  const TransferBlocks transfer = TransferBlocks::make(&piece, 1, piece.bytes, 16, true);
  CHECK(transfer(transfer.words.count - 1).to == base + piece.bytes - 16);
}

TEST_CASE("copy_blocks copies what the host pool copies") {
  for_each_shape([](const std::vector<Region>& mine, HostPool& host, std::mt19937& random) {
    for (const std::int32_t count : {0, 1, 4}) {
      std::vector<std::int32_t> copies;
      for (std::int32_t c = 0; c < count; ++c) {  // sources and targets are different blocks
        copies.insert(copies.end(), {c, 4 + c, below(random, host.block_size() + 1)});
      }
      if (count > 0) copies.insert(copies.end(), {8, 8, host.block_size()});
      host.copy_blocks(copies);
      run(CopyBlocks::make(mine.data(), static_cast<std::int32_t>(mine.size()), copies.data(),
                           static_cast<std::int32_t>(copies.size() / 3),
                           largest(mine, host.block_size()), word_bytes(mine)),
          random);
    }
  });
}

TEST_CASE("scatter_kv writes what the host pool writes, keys and values at once") {
  for_each_shape([](const std::vector<Region>& mine, HostPool& host, std::mt19937& random) {
    for (std::size_t r = 0; r < mine.size(); r += 2) {
      const std::size_t num_parts = std::min<std::size_t>(2, mine.size() - r);
      for (const std::int64_t padding : {0, 1, 16}) {
        std::vector<std::int64_t> slots(
            static_cast<std::size_t>(Pools::kBlocks * host.block_size()));
        std::iota(slots.begin(), slots.end(), 0);
        std::ranges::shuffle(slots, random);
        slots.resize(random() % slots.size());
        std::vector<std::vector<std::byte>> sources;
        std::vector<ScatterPart> parts;
        for (std::size_t p = 0; p < num_parts; ++p) {
          const std::int64_t stride = mine[r + p].token_bytes + padding;
          sources.push_back(noise(slots.size() * static_cast<std::size_t>(stride) + 1, random));
          parts.push_back({mine[r + p], sources[p].data() + (padding == 1), stride});
          host.scatter(r + p, slots, parts[p].source, stride);
        }
        run(ScatterKv::make(parts.data(), static_cast<int>(num_parts), slots.data(),
                            static_cast<std::int64_t>(slots.size()), host.block_size()),
            random);
      }
    }
  });
}

TEST_CASE("gather_kv gathers what the host pool gathers, zeros among it") {
  for_each_shape([](const std::vector<Region>& mine, HostPool& host, std::mt19937& random) {
    constexpr std::int32_t kRows = 3, kWidth = 5;
    const std::int32_t block_size = host.block_size();
    std::vector<std::int32_t> table(kRows * (kWidth + 2));
    for (std::int32_t& cell : table) cell = below(random, Pools::kBlocks);
    const TableView view{table.data(), kWidth + 2, kRows, kWidth};
    for (const std::int32_t first : {0, 2}) {
      std::vector<std::int32_t> tokens(kRows);
      for (std::int32_t& n : tokens) n = below(random, (kWidth - first) * block_size + 1);
      tokens[1] = 0;
      const std::int32_t width = *std::ranges::max_element(tokens) + below(random, 2);
      for (std::size_t r = 0; r < mine.size(); ++r) {
        for (const std::int32_t heads : {1, 2}) {
          if (mine[r].token_bytes % heads != 0) continue;
          const auto size = static_cast<std::size_t>(kRows * width * mine[r].token_bytes);
          std::vector<std::byte> found = noise(size, random), expected = found;
          host.gather(r, view, first, tokens, heads, width, expected.data());
          run(GatherKv::make(mine[r], view, first, tokens.data(), heads, width, block_size,
                             found.data()),
              random);
          CHECK(found == expected);
        }
      }
    }
  });
}

TEST_CASE("transfer_blocks moves pieces of any length") {
  std::mt19937 random(3);
  for (const int bytes : {16, 4, 1}) {
    for (const std::int64_t piece_bytes : {16, 48, 256}) {
      std::vector<std::byte> from = noise(4096, random), to = noise(4096, random), expected = to;
      std::vector<TransferPiece> pieces;
      for (std::int64_t at = 0; at < 3500; at += 512) {
        const std::int64_t length =
            1 + below(random, static_cast<std::int32_t>(piece_bytes / bytes));
        const TransferPiece piece{to.data() + at, from.data() + (at + 256) % 4096 / 16 * 16,
                                  std::min(piece_bytes, length * bytes)};
        pieces.push_back(piece);
        std::memcpy(expected.data() + at, piece.from, static_cast<std::size_t>(piece.bytes));
      }
      run(TransferBlocks::make(pieces.data(), static_cast<std::int64_t>(pieces.size()), piece_bytes,
                               bytes, pieces.size() % 2 == 0),
          random);
      CHECK(to == expected);
    }
  }
  CHECK(TransferBlocks::make(nullptr, 0, 0, 16, true).words.count == 0);
}

TEST_CASE("update_tables writes the cells that changed, and no other") {
  std::mt19937 random(5);
  std::vector<std::int32_t> tables(6 * 10, -1), expected = tables, cells(40);
  std::iota(cells.begin(), cells.end(), 100);
  const std::vector<TableCells> updates{{0, 0, 1, 0}, {2, 3, 10, 1}, {5, 9, 10, 8}, {4, 2, 2, 9}};
  for (const TableCells& u : updates) {
    for (std::int32_t c = u.first; c < u.last; ++c) {
      expected[static_cast<std::size_t>(u.row * 10 + c)] =
          cells[static_cast<std::size_t>(u.start + c - u.first)];
    }
  }
  run(UpdateTables::make(updates.data(), 4, 7, cells.data(), tables.data(), 10), random);
  CHECK(tables == expected);
  CHECK(UpdateTables::make(nullptr, 0, 0, nullptr, nullptr, 10).words.count == 0);
}
