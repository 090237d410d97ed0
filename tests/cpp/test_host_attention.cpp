// Attention off the blocks against the same in double, by both instruction sets.
#include <doctest/doctest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "core/error.h"
#include "host/host_attention.h"

using namespace pagedkv;

namespace {

struct Case {
  FloatType type = FloatType::kFloat32;
  bool latent = false;
  int block_size = 16, num_kv_heads = 2, group = 1, k_dim = 8, v_dim = 8;
  float scale = 0.3f, softcap = 0;
  int window = 0;
  std::vector<std::int32_t> lengths = {1}, firsts = {};

  int query_dim() const { return latent ? k_dim + v_dim : k_dim; }
  int output_dim() const { return latent ? k_dim : v_dim; }
};

// Keys and values at random in blocks at random, in memory with gaps that hold NaN.
struct Memory {
  explicit Memory(const Case& c) : shape(c) {
    const int bytes = c.type == FloatType::kFloat32 ? 4 : 2;
    width = (*std::max_element(c.lengths.begin(), c.lengths.end()) - 1) / c.block_size + 1;
    const int rows = static_cast<int>(c.lengths.size()), num_blocks = rows * width + 1;
    for (int i = 0; i < num_blocks - 1; ++i) table.push_back(i + 1);
    std::shuffle(table.begin(), table.end(), random);
    const int dims[2] = {c.k_dim, c.v_dim};
    std::vector<Region> regions;
    for (int part = 0; part < 2; ++part) {
      const int token = c.num_kv_heads * dims[part] * bytes, stride = c.block_size * token + 12;
      memory[part].assign(static_cast<std::size_t>(num_blocks * stride), std::byte{0xff});
      regions.push_back({memory[part].data(), stride, token});
    }
    pool = std::make_unique<HostPool>(regions, num_blocks, c.block_size);
    queries.resize(static_cast<std::size_t>(rows * c.num_kv_heads * c.group * c.query_dim()));
    for (float& x : queries) x = normal(random);
    for (int b = 0; b < rows; ++b) {
      for (int t = 0; t < c.lengths[static_cast<std::size_t>(b)]; ++t) {
        for (int part = 0; part < 2; ++part) {
          for (int i = 0; i < c.num_kv_heads * dims[part]; ++i) {
            // Later keys weigh more, so that the largest score keeps growing.
            put(part, b, t, i, normal(random) * (1 + 0.01f * static_cast<float>(t)));
          }
        }
      }
    }
  }

  std::byte* at(int part, int row, int token, int i) const {
    const Region& r = pool->regions()[static_cast<std::size_t>(part)];
    const int block = table[static_cast<std::size_t>(row * width + token / shape.block_size)];
    return r.base + block * r.block_stride + (token % shape.block_size) * r.token_bytes +
           i * (shape.type == FloatType::kFloat32 ? 4 : 2);
  }

  void put(int part, int row, int token, int i, float value) {
    if (shape.type == FloatType::kFloat32) {
      std::memcpy(at(part, row, token, i), &value, 4);
    } else {
      const auto half = static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(value) >> 16);
      std::memcpy(at(part, row, token, i), &half, 2);
    }
  }

  double get(int part, int row, int token, int i) const {
    std::uint32_t word = 0;
    if (shape.type == FloatType::kFloat32) {
      std::memcpy(&word, at(part, row, token, i), 4);
    } else {
      std::uint16_t half;
      std::memcpy(&half, at(part, row, token, i), 2);
      word = std::uint32_t{half} << 16;
    }
    return std::bit_cast<float>(word);
  }

  // Outputs, then the sums.
  std::vector<double> expected() const {
    std::vector<double> outputs, sums;
    const int heads = shape.num_kv_heads * shape.group;
    for (int b = 0; b < static_cast<int>(shape.lengths.size()); ++b) {
      const int length = shape.lengths[static_cast<std::size_t>(b)];
      for (int q = 0; q < heads; ++q) {
        const int h = q / shape.group;
        const int asked = shape.firsts.empty() ? 0 : shape.firsts[static_cast<std::size_t>(b)];
        const int first = std::max(asked, shape.window > 0 ? length - shape.window : 0);
        std::vector<double> scores, total(static_cast<std::size_t>(shape.output_dim()));
        for (int t = first; t < length; ++t) {
          double score = 0;
          for (int d = 0; d < shape.query_dim(); ++d) {
            score += queries[static_cast<std::size_t>((b * heads + q) * shape.query_dim() + d)] *
                     (d < shape.k_dim ? get(0, b, t, h * shape.k_dim + d)
                                      : get(1, b, t, h * shape.v_dim + d - shape.k_dim));
          }
          score *= shape.scale;
          if (shape.softcap > 0) score = shape.softcap * std::tanh(score / shape.softcap);
          scores.push_back(score);
        }
        const double largest = std::ranges::max(scores);
        double sum = 0;
        for (int t = first; t < length; ++t) {
          const double weight = std::exp(scores[static_cast<std::size_t>(t - first)] - largest);
          sum += weight;
          const int part = shape.latent ? 0 : 1, dim = shape.output_dim();
          for (int d = 0; d < dim; ++d) {
            total[static_cast<std::size_t>(d)] += weight * get(part, b, t, h * dim + d);
          }
        }
        for (const double x : total) outputs.push_back(x / sum);
        sums.push_back(largest + std::log(sum));
      }
    }
    outputs.insert(outputs.end(), sums.begin(), sums.end());
    return outputs;
  }

  TableView view() const {
    return {table.data(), width, static_cast<std::int32_t>(shape.lengths.size()), width};
  }

  std::vector<float> found(decltype(&attend) run, int num_threads = 1) const {
    const std::size_t heads = queries.size() / static_cast<std::size_t>(shape.query_dim());
    const std::size_t size = heads * static_cast<std::size_t>(shape.output_dim());
    std::vector<float> outputs(size + heads, NAN);
    DecodeRows asked = rows(outputs.data());
    run(*pool, view(), shape.lengths, asked, num_threads);
    asked.sums = outputs.data() + size;
    run(*pool, view(), shape.lengths, asked, num_threads);
    return outputs;
  }

  DecodeRows rows(float* outputs) const {
    return {.layer = 0,
            .type = shape.type,
            .latent = shape.latent,
            .num_kv_heads = shape.num_kv_heads,
            .group = shape.group,
            .scale = shape.scale,
            .softcap = shape.softcap,
            .window = shape.window,
            .firsts = shape.firsts.empty() ? nullptr : shape.firsts.data(),
            .queries = queries.data(),
            .outputs = outputs,
            .sums = nullptr};
  }

  Case shape;
  int width;
  std::mt19937 random{7};
  std::normal_distribution<float> normal;
  std::vector<std::int32_t> table;
  std::vector<std::byte> memory[2];
  std::unique_ptr<HostPool> pool;
  std::vector<float> queries;
};

void check(const Case& c, int num_threads = 1) {
  const Memory memory(c);
  const std::vector<double> expected = memory.expected();
  for (const auto run : {&attend, &attend_portably}) {
    const std::vector<float> outputs = memory.found(run, num_threads);
    REQUIRE(outputs.size() == expected.size());
    for (std::size_t i = 0; i < outputs.size(); ++i) {
      CHECK(outputs[i] == doctest::Approx(expected[i]).epsilon(1e-4).scale(1));
    }
  }
}

}  // namespace

TEST_CASE("attention off the blocks is attention") {
  for (const auto type : {FloatType::kFloat32, FloatType::kBFloat16}) {
    check({.type = type});
    check({.type = type, .group = 3, .k_dim = 64, .v_dim = 64, .lengths = {1, 15, 16, 17, 250}});
    check({.type = type,
           .block_size = 5,
           .num_kv_heads = 3,
           .group = 4,
           .k_dim = 72,
           .v_dim = 80,
           .lengths = {33, 4}});
    check({.type = type,
           .num_kv_heads = 1,
           .group = 5,
           .k_dim = 16,
           .v_dim = 136,
           .lengths = {9, 60}});
  }
}

TEST_CASE("keys that go on in the other region, and are values as far as they are in the first") {
  for (const auto type : {FloatType::kFloat32, FloatType::kBFloat16}) {
    for (const int block_size : {1, 3, 5, 16}) {  // scores that end within four, and in them
      Case c{.type = type, .latent = true, .block_size = block_size, .num_kv_heads = 1};
      c.group = 5, c.k_dim = 64, c.v_dim = 16, c.lengths = {1, 7, 33, 300};
      check(c);
      c.firsts = {0, 2, 30, 259}, c.softcap = 2;
      check(c);
      c.num_kv_heads = 2, c.k_dim = 8, c.v_dim = 24, c.window = 11;
      check(c);
    }
    check({.type = type,
           .latent = true,
           .num_kv_heads = 1,
           .group = 16,
           .k_dim = 512,
           .v_dim = 64,
           .scale = 0.05f,
           .lengths = {1100, 20}},
          3);
  }
}

TEST_CASE("a long sequence is read in parts, whose softmax is one") {
  check({.group = 2, .lengths = {255, 256, 257, 700}});
  check({.block_size = 48, .lengths = {511, 1024}});
}

TEST_CASE("several threads read long rows in pieces, and many rows one by one") {
  // A piece is of 256 tokens: 128 make the 1 MiB that a thread is worth.
  const Case wide{.num_kv_heads = 8, .group = 2, .k_dim = 128, .v_dim = 128, .scale = 0.05f};
  for (const std::vector<std::int32_t>& lengths :
       {std::vector<std::int32_t>{1100}, {1, 513, 700, 512}, {260, 30, 200, 256, 257, 17}}) {
    Case c = wide;
    c.lengths = lengths;
    check(c, 3);
    for (const std::int32_t length : lengths) c.firsts.push_back(length / 3);
    c.window = 600;
    c.type = FloatType::kBFloat16;
    check(c, 16);
  }
}

TEST_CASE("a piece whose keys have no weight at all adds nothing, and a NaN of weight shows") {
  const Case c{.num_kv_heads = 8, .k_dim = 128, .v_dim = 128, .scale = 1, .lengths = {1200}};
  Memory memory(c);
  std::ranges::fill(memory.queries, 1.0f);
  for (int t = 0; t < 600; ++t) memory.put(0, 0, t, 0, -INFINITY);  // of the first KV head
  const std::vector<double> expected = memory.expected();
  for (const int num_threads : {1, 4}) {
    const std::vector<float> outputs = memory.found(&attend, num_threads);
    for (std::size_t i = 0; i < outputs.size(); ++i) {
      CHECK(outputs[i] == doctest::Approx(expected[i]).epsilon(1e-4).scale(1));
    }
  }
  for (int t = 600; t < 1200; ++t) memory.put(1, 0, t, 3, t < 900 ? 3e38f : 0);
  for (int t = 600; t < 900; ++t) memory.put(0, 0, t, 0, -1e6f);  // weighs nothing at all
  CHECK(memory.found(&attend)[3] == 0);
  memory.put(1, 0, 1100, 5, NAN);
  for (const int num_threads : {1, 4}) {
    const std::vector<float> outputs = memory.found(&attend, num_threads);
    CHECK(std::isnan(outputs[5]));
    CHECK(!std::isnan(outputs[6]));
  }
  for (int t = 0; t < 256; ++t) memory.put(0, 0, t, 130, NAN);  // all that is read at a time
  CHECK(std::isnan(memory.found(&attend)[130]));
}

TEST_CASE("a window hides all that is before it, and a softcap bounds scores") {
  for (const int window : {1, 7, 16, 300, 2000}) {
    check({.group = 2, .window = window, .lengths = {1, 16, 40, 700}});
  }
  check({.group = 2, .softcap = 1.5f, .lengths = {1, 40, 300}});
  check({.softcap = 0.7f, .window = 21, .lengths = {40}});
}

TEST_CASE("tokens can be left out at the front") {
  for (const int first : {1, 16, 30, 299}) {
    check({.group = 3, .lengths = {300, 310, 1}, .firsts = {first, 309 - first, 0}});
  }
  check({.window = 9, .lengths = {25, 60}, .firsts = {20, 20}});
}

TEST_CASE("scores of any size neither overflow nor vanish") {
  for (const float scale : {1e-6f, 100.0f, 0.0f, -0.5f}) {
    check({.scale = scale, .lengths = {5, 300}});
    check({.scale = scale, .softcap = 2.0f, .lengths = {5, 300}});
  }
}

TEST_CASE(
    "a block outside the pool, or a head of odd size, is refused before anything is written") {
  static constexpr std::int32_t twenty = 20, below = -1;
  Memory memory(Case{.lengths = {20}});
  std::vector<float> outputs(16, 3.0f);
  const auto refused = [&](DecodeRows rows) {
    CHECK_THROWS_AS(attend(*memory.pool, memory.view(), memory.shape.lengths, rows), InvalidSpec);
    CHECK(std::ranges::all_of(outputs, [](float x) { return x == 3.0f; }));
  };
  const DecodeRows rows = memory.rows(outputs.data());
  for (const auto change : std::vector<void (*)(DecodeRows&)>{
           [](DecodeRows& r) { r.num_kv_heads = 4; }, [](DecodeRows& r) { r.num_kv_heads = 3; },
           [](DecodeRows& r) { r.group = 0; }, [](DecodeRows& r) { r.layer = 1; },
           [](DecodeRows& r) { r.firsts = &twenty; }, [](DecodeRows& r) { r.firsts = &below; },
           [](DecodeRows& r) { r.type = FloatType::kBFloat16, r.num_kv_heads = 8; }}) {
    DecodeRows changed = rows;
    change(changed);
    refused(changed);
  }
  memory.table[1] = 99;
  refused(rows);
  memory.table[1] = 1;
  memory.shape.lengths = {33};  // past its table
  refused(rows);
}
