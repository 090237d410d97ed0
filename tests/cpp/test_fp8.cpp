// Rounding to 8-bit floats against the nearest of all their values, and scatter_fp8 in a random
// order against a loop over tokens. All memory is compared.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "cuda/scatter_fp8.h"
#include "cuda/simulated_runtime.h"

using namespace pagedkv;

namespace {

constexpr std::array kFormats{Fp8::e4m3, Fp8::e5m2};

// What sign, exponent and mantissa of so many bits stand for; infinity and NaN are not asked for.
double decode(unsigned bits, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const unsigned mantissa = bits & ((1u << mantissa_bits) - 1);
  const int exponent = static_cast<int>(bits >> mantissa_bits & ((1u << exponent_bits) - 1));
  const double magnitude =
      exponent == 0 ? std::ldexp(mantissa, 1 - bias - mantissa_bits)
                    : std::ldexp(mantissa + (1u << mantissa_bits), exponent - bias - mantissa_bits);
  return bits >> (exponent_bits + mantissa_bits) & 1 ? -magnitude : magnitude;
}

// The finite values that are not negative, by their bits.
std::vector<double> values_of(Fp8 format) {
  const bool e4m3 = format == Fp8::e4m3;
  std::vector<double> values;
  for (unsigned bits = 0; bits <= (e4m3 ? 0x7eu : 0x7bu); ++bits) {
    values.push_back(decode(bits, e4m3 ? 4 : 5, e4m3 ? 3 : 2));
  }
  return values;
}

unsigned nearest(double x, const std::vector<double>& values) {
  if (std::isnan(x)) return 0x7f;
  const double magnitude = std::min(std::abs(x), values.back());
  const auto above = std::ranges::lower_bound(values, magnitude);
  auto bits = static_cast<unsigned>(above - values.begin());
  if (bits > 0) {
    const double up = *above - magnitude, down = magnitude - values[bits - 1];
    if (down < up || (down == up && bits % 2 == 1)) --bits;
  }
  return bits | (std::signbit(x) ? 0x80u : 0u);
}

template <class Value>
void check_all_inputs(int exponent_bits, int mantissa_bits) {
  for (const Fp8 format : kFormats) {
    const std::vector<double> values = values_of(format);
    int wrong = 0;
    for (unsigned bits = 0; bits <= 0xffff; ++bits) {
      const float x = to_float(Value{static_cast<std::uint16_t>(bits)});
      const unsigned exponent = bits >> mantissa_bits & ((1u << exponent_bits) - 1);
      if (exponent == (1u << exponent_bits) - 1) {
        const bool nan = (bits & ((1u << mantissa_bits) - 1)) != 0;
        wrong += nan ? !std::isnan(x) : !std::isinf(x);
      } else {
        wrong += x != decode(bits, exponent_bits, mantissa_bits);
      }
      wrong += std::signbit(x) != (bits >= 0x8000);
      for (const float scale : {1.0f, 0.37f, 1024.0f}) {
        wrong += to_fp8(x / scale, format) != nearest(x / scale, values);
      }
    }
    CHECK(wrong == 0);
  }
}

// Two regions, strange strides, and what surrounds them.
template <class Value>
struct Scene {
  std::int32_t block_size;
  std::int64_t heads[2];  // values of a token, of keys and of values
  std::int64_t padding;   // values between tokens of the source
  static constexpr std::int32_t kBlocks = 5;

  void run(SourceType type, Fp8 format, std::mt19937& random) {
    std::vector<std::byte> memory(kBlocks * block_size * 3 * 64 + 256);
    for (std::byte& b : memory) b = static_cast<std::byte>(random());
    std::byte* const base =
        memory.data() + (64 - reinterpret_cast<std::uintptr_t>(memory.data()) % 64);
    const std::int64_t stride = (heads[0] + heads[1]) * block_size;
    std::vector<std::int64_t> slots(static_cast<std::size_t>(kBlocks * block_size));
    std::iota(slots.begin(), slots.end(), 0);
    std::ranges::shuffle(slots, random);
    slots.resize(random() % slots.size() + 1);

    std::vector<std::byte> sources[2];
    ScatterFp8::Part parts[2];
    std::vector<std::byte> expected = memory;
    for (int p = 0; p < 2; ++p) {
      const std::int64_t row = heads[p] + padding;
      sources[p].resize(slots.size() * static_cast<std::size_t>(row) * sizeof(Value));
      for (std::byte& b : sources[p]) b = static_cast<std::byte>(random());
      const float scale = p == 0 ? 0.5f : 3.0f;
      parts[p] = {{{base + (p == 0 ? 0 : heads[0] * block_size), stride, heads[p]},
                   sources[p].data(),
                   row * static_cast<std::int64_t>(sizeof(Value))},
                  scale};
      for (std::size_t t = 0; t < slots.size(); ++t) {
        std::byte* const to = expected.data() + (parts[p].region.base - memory.data()) +
                              slots[t] / block_size * stride + slots[t] % block_size * heads[p];
        for (std::int64_t v = 0; v < heads[p]; ++v) {
          Value value;
          std::memcpy(&value,
                      sources[p].data() + (static_cast<std::int64_t>(t) * row + v) *
                                              static_cast<std::int64_t>(sizeof(Value)),
                      sizeof(Value));
          to[v] = static_cast<std::byte>(nearest(to_float(value) / scale, values_of(format)));
        }
      }
    }
    const ScatterFp8 kernel = ScatterFp8::make(parts, 2, type, format, slots.data(),
                                               static_cast<std::int64_t>(slots.size()), block_size);
    const bool whole_strides = padding % 16 == 0 || slots.size() == 1;  // one token has none
    const bool wide = heads[0] % 16 == 0 && heads[1] % 16 == 0 && whole_strides;
    CHECK(kernel.values == (wide ? 16 : 1));
    std::vector<std::int64_t> order(static_cast<std::size_t>(kernel.count));
    std::iota(order.begin(), order.end(), 0);
    std::ranges::shuffle(order, random);
    kernel.dispatch([&]<class V, int kCount>() {
      CHECK(sizeof(V) == sizeof(Value));
      CHECK(kCount == kernel.values);
      for (const std::int64_t i : order) kernel.convert<V, kCount>(i);
    });
    CHECK(memory == expected);
  }
};

template <class Value>
void scatter_all(SourceType type) {
  std::mt19937 random(11);
  for (const Fp8 format : kFormats) {
    for (const std::int32_t block_size : {1, 3, 16}) {
      for (const std::int64_t padding : {0, 1, 16}) {
        Scene<Value>{block_size, {32, 32}, padding}.run(type, format, random);
        Scene<Value>{block_size, {64, 16}, padding}.run(type, format, random);
        Scene<Value>{block_size, {7, 24}, padding}.run(type, format, random);
      }
    }
  }
}

}  // namespace

TEST_CASE("every bf16 becomes the nearest 8-bit float") { check_all_inputs<Bf16>(8, 7); }
TEST_CASE("every fp16 becomes the nearest 8-bit float") { check_all_inputs<Fp16>(5, 10); }

TEST_CASE("floats at and beside every tie, and at the ends") {
  for (const Fp8 format : kFormats) {
    const std::vector<double> values = values_of(format);
    std::vector<float> inputs{0.0f,
                              std::numeric_limits<float>::denorm_min(),
                              std::numeric_limits<float>::min(),
                              std::numeric_limits<float>::max(),
                              std::numeric_limits<float>::infinity(),
                              std::numeric_limits<float>::quiet_NaN()};
    for (std::size_t i = 0; i < values.size(); ++i) {
      const double next = i + 1 < values.size() ? values[i + 1] : 2 * values[i] - values[i - 1];
      for (const double at : {values[i], (values[i] + next) / 2}) {
        const auto x = static_cast<float>(at);
        inputs.insert(inputs.end(), {x, std::nextafter(x, 0.0f), std::nextafter(x, 1e9f)});
      }
    }
    for (const float x : inputs) {
      CAPTURE(x);
      CHECK(to_fp8(x, format) == nearest(x, values));
      CHECK(to_fp8(-x, format) == nearest(-x, values));
    }
  }
}

TEST_CASE("scatter_fp8 writes the rounded values into their slots, and nothing else") {
  scatter_all<Bf16>(SourceType::bf16);
  scatter_all<Fp16>(SourceType::fp16);
  scatter_all<float>(SourceType::fp32);
}

TEST_CASE("scatter_fp8 without tokens has nothing to do") {
  const ScatterFp8::Part part{{{nullptr, 64, 64}, nullptr, 128}, 1.0f};
  CHECK(ScatterFp8::make(&part, 1, SourceType::bf16, Fp8::e4m3, nullptr, 0, 1).count == 0);
}

TEST_CASE("scatter_fp8 is launched like any kernel, and waits for its turn") {
  SimulatedRuntime runtime({.schedule = Schedule::lazy});
  const float source = 1.0f;
  const std::int64_t slot = 2;
  std::array<std::byte, 4> pool{};
  const ScatterFp8::Part part{{{pool.data(), 1, 1}, reinterpret_cast<const std::byte*>(&source), 4},
                              2.0f};
  CudaStream stream = nullptr;
  REQUIRE(runtime.create_stream(&stream) == 0);
  const ScatterFp8 kernel = ScatterFp8::make(&part, 1, SourceType::fp32, Fp8::e4m3, &slot, 1, 1);
  REQUIRE(runtime.launch(kernel, stream) == 0);
  CHECK(pool[2] == std::byte{0});
  REQUIRE(runtime.synchronize(stream) == 0);
  CHECK(pool == std::array{std::byte{0}, std::byte{0}, std::byte{0x30}, std::byte{0}});  // 0.5
  CHECK(runtime.destroy_stream(stream) == 0);
}
