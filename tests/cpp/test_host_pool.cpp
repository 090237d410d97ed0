// Copies in host memory: the right bytes, and no others.
#include <doctest/doctest.h>

#include <array>
#include <cstring>
#include <limits>
#include <vector>

#include "core/error.h"
#include "host/host_pool.h"

using namespace pagedkv;

namespace {

constexpr int kBlocks = 5;
constexpr int kBlockSize = 4;
constexpr int kTokenBytes = 6;
constexpr int kStride = kBlockSize * kTokenBytes + 3;  // a gap behind each block

struct Memory {
  std::vector<std::byte> bytes = std::vector<std::byte>(kBlocks * kStride, std::byte{0xee});
  HostPool pool{{{bytes.data(), kStride, kTokenBytes}}, kBlocks, kBlockSize};

  std::byte* token(int block, int offset) {
    return bytes.data() + block * kStride + offset * kTokenBytes;
  }
};

std::array<std::byte, kTokenBytes> filled(int value) {
  std::array<std::byte, kTokenBytes> token;
  token.fill(static_cast<std::byte>(value));
  return token;
}

}  // namespace

TEST_CASE("scatter writes one token to its slot and nothing beside it") {
  Memory m;
  const auto token = filled(7);
  const std::int64_t slot = 2 * kBlockSize + 3;
  auto expected = m.bytes;
  std::memcpy(expected.data() + 2 * kStride + 3 * kTokenBytes, token.data(), kTokenBytes);
  m.pool.scatter(0, {&slot, 1}, token.data(), kTokenBytes);
  CHECK(m.bytes == expected);
}

TEST_CASE("a copy takes the first tokens of a block only") {
  Memory m;
  for (int o = 0; o < kBlockSize; ++o) {
    std::memset(m.token(1, o), o, kTokenBytes);
  }
  auto expected = m.bytes;
  std::memcpy(expected.data() + 3 * kStride, m.token(1, 0), 2 * kTokenBytes);
  const std::int32_t copy[3] = {1, 3, 2};
  m.pool.copy_blocks(copy);
  CHECK(m.bytes == expected);
}

TEST_CASE("gather puts heads first and zeros behind each row") {
  Memory m;
  for (int b = 0; b < kBlocks; ++b) {
    for (int o = 0; o < kBlockSize; ++o) {
      for (int i = 0; i < kTokenBytes; ++i) {
        m.token(b, o)[i] = static_cast<std::byte>(16 * (4 * b + o) / 4 + i);
      }
    }
  }
  const std::int32_t cells[2][3] = {{3, 1, 0}, {2, 0, 0}};
  const std::int32_t lengths[2] = {6, 1};
  const int width = 7, num_heads = 3, head = kTokenBytes / num_heads;
  std::vector<std::byte> target(2 * num_heads * width * head, std::byte{0xaa});
  m.pool.gather(0, {&cells[0][0], 3, 2, 3}, 0, lengths, num_heads, width, target.data());
  for (int b = 0; b < 2; ++b) {
    for (int h = 0; h < num_heads; ++h) {
      for (int t = 0; t < width; ++t) {
        for (int i = 0; i < head; ++i) {
          const std::byte expected =
              t < lengths[b] ? m.token(cells[b][t / kBlockSize], t % kBlockSize)[h * head + i]
                             : std::byte{0};
          CHECK(target[static_cast<std::size_t>(((b * num_heads + h) * width + t) * head + i)] ==
                expected);
        }
      }
    }
  }
}

TEST_CASE("a block or slot outside the pool is refused before memory is touched") {
  Memory m;
  const auto before = m.bytes;
  const auto token = filled(1);
  const std::array<std::int64_t, 2> slots{0, kBlocks * kBlockSize};
  CHECK_THROWS_AS(m.pool.scatter(0, slots, token.data(), 0), InvalidSpec);
  CHECK_THROWS_AS(m.pool.scatter(1, {slots.data(), 1}, token.data(), 0), InvalidSpec);
  for (const std::int64_t negative : {std::int64_t{-1}, std::numeric_limits<std::int64_t>::min()}) {
    CHECK_THROWS_AS(m.pool.scatter(0, {&negative, 1}, token.data(), 0), InvalidSpec);
  }
  const std::int32_t copies[6] = {1, 2, 1, 1, kBlocks, 1};
  CHECK_THROWS_AS(m.pool.copy_blocks(copies), InvalidSpec);
  const std::int32_t too_long[3] = {1, 2, kBlockSize + 1};
  CHECK_THROWS_AS(m.pool.copy_blocks(too_long), InvalidSpec);
  std::vector<std::byte> target(64);
  const std::int32_t cell = kBlocks, length = 1, past = kBlockSize + 1;
  const std::int32_t one = 1;
  CHECK_THROWS_AS(m.pool.gather(0, {&cell, 1, 1, 1}, 0, {&length, 1}, 1, 8, target.data()),
                  InvalidSpec);
  CHECK_THROWS_AS(m.pool.gather(0, {&one, 1, 1, 1}, 0, {&past, 1}, 1, 8, target.data()),
                  InvalidSpec);
  CHECK_THROWS_AS(m.pool.gather(0, {&one, 1, 1, 1}, 0, {&length, 1}, 4, 8, target.data()),
                  InvalidSpec);
  CHECK(m.bytes == before);
}

TEST_CASE("regions whose blocks overlap are refused") {
  std::byte memory[64];
  CHECK_THROWS_AS(HostPool({{memory, kTokenBytes, kTokenBytes}}, 2, kBlockSize), InvalidSpec);
  CHECK_THROWS_AS(HostPool({{nullptr, 64, kTokenBytes}}, 2, kBlockSize), InvalidSpec);
}
