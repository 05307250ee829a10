#include "modularbase/kernels/kv_tile.h"

#include <doctest/doctest.h>
#include <ggml-cpu.h>
#include <ggml.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "modularbase/kernels/hadamard.h"

using namespace modularbase::kernels;

namespace {

constexpr TileFormat kFormats[] = {
    TileFormat::kF16,      TileFormat::kBF16,      TileFormat::kQ8_0,       TileFormat::kQ4Keys,
    TileFormat::kQ4Values, TileFormat::kQ4KeyRows, TileFormat::kQ4ValueRows};

bool is_q4(TileFormat format) {
  return format >= TileFormat::kQ4Keys;
}

std::vector<float> random_rows(std::int64_t head_dim, unsigned seed, float mean = 0.0f) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(mean);
  std::vector<float> rows(static_cast<std::size_t>(kBlockTokens * head_dim));
  for (float& value : rows) value = normal(random);
  return rows;
}

std::vector<std::byte> written(TileFormat format, const std::vector<float>& rows,
                               std::int64_t head_dim) {
  std::vector<std::byte> tile(tile_bytes(format, head_dim) + 1, std::byte{0xa5});
  write_tile(format, rows.data(), head_dim, tile.data());
  CHECK(tile.back() == std::byte{0xa5});  // nothing past the end
  tile.pop_back();
  return tile;
}

std::vector<float> read(TileFormat format, const std::vector<std::byte>& tile,
                        std::int64_t head_dim) {
  std::vector<float> rows(static_cast<std::size_t>(kBlockTokens * head_dim), NAN);
  read_tile(format, tile.data(), head_dim, rows.data());
  return rows;
}

/// Root of the mean squared difference over that of the numbers.
double relative_error(const std::vector<float>& found, const std::vector<float>& expected) {
  double error = 0.0, size = 0.0;
  for (std::size_t i = 0; i < found.size(); ++i) {
    const double difference = static_cast<double>(found[i]) - expected[i];
    error += difference * difference;
    size += static_cast<double>(expected[i]) * expected[i];
  }
  return std::sqrt(error / size);
}

}  // namespace

TEST_CASE("the fast Hadamard rotation equals the product with Sylvester's matrix") {
  for (const std::int64_t head_dim : {16, 32, 64, 80, 96, 128, 256}) {
    CAPTURE(head_dim);
    std::vector<float> x = random_rows(head_dim, 3);
    x.resize(static_cast<std::size_t>(head_dim));
    const std::vector<float> before = x;
    hadamard_rotate(x.data(), head_dim);
    const std::int64_t n = hadamard_size(head_dim);
    double worst = 0.0;
    for (std::int64_t i = 0; i < head_dim; ++i) {
      double sum = 0.0;
      for (std::int64_t j = 0; j < n; ++j) {
        const int sign = __builtin_parityll(static_cast<std::uint64_t>(i % n & j)) ? -1 : 1;
        sum += sign * static_cast<double>(before[static_cast<std::size_t>(i / n * n + j)]);
      }
      const double expected = sum / std::sqrt(static_cast<double>(n));
      worst = std::max(worst, std::fabs(expected - x[static_cast<std::size_t>(i)]));
    }
    CHECK(worst < 4e-6);  // log2 n additions of values near 1 in F32
    hadamard_rotate(x.data(), head_dim);
    CHECK(relative_error(x, before) < 1e-6);  // its own inverse
  }
  CHECK(hadamard_size(96) == 32);
  CHECK(hadamard_size(256) == 128);
}

TEST_CASE("a tile takes the bytes its format says, and whole groups only") {
  CHECK(tile_bytes(TileFormat::kF16, 64) == 64 * 64 * 2);
  CHECK(tile_bytes(TileFormat::kQ8_0, 64) == 64 * 2 * 34);
  CHECK(tile_bytes(TileFormat::kQ4Keys, 64) == 64 * 2 + 64 * 2 * 2 + 64 * 64 / 2);  // 4.75 bits
  CHECK(tile_bytes(TileFormat::kQ4Values, 64) == 64 * 2 * 2 + 64 * 64 / 2);         // 4.5 bits
  for (const TileFormat format : kFormats) {
    CHECK(tile_supported(format, 96));
    const bool is_float = format == TileFormat::kF16 || format == TileFormat::kBF16;
    CHECK(tile_supported(format, 80) == is_float);
  }
}

TEST_CASE("what a tile was written from is read back to the format's precision") {
  // Rounding to 11 or 8 bits, to 127 steps of the largest of 32 (about 2.1 deviations), and to 4
  // bits of it: a step of about 2.1 / 7.5 deviations, over the root of 12.
  const double bounds[] = {3e-4, 2.5e-3, 6e-3, 0.09, 0.09, 0.09, 0.09};
  for (const std::int64_t head_dim : {32, 64, 96, 128}) {
    const std::vector<float> rows = random_rows(head_dim, 5);
    for (const TileFormat format : kFormats) {
      CAPTURE(head_dim);
      CAPTURE(static_cast<int>(format));
      const std::vector<float> found = read(format, written(format, rows, head_dim), head_dim);
      const double error = relative_error(found, rows);
      CHECK(error < bounds[static_cast<int>(format)]);
      CHECK(error > bounds[static_cast<int>(format)] / 3);  // not more than the bits can say
    }
  }
}

TEST_CASE("what a tile says is what it keeps when it is written again") {
  for (const TileFormat format : kFormats) {
    CAPTURE(static_cast<int>(format));
    const std::vector<float> rows = random_rows(64, 7, 0.5f);
    const std::vector<float> once = read(format, written(format, rows, 64), 64);
    const std::vector<float> twice = read(format, written(format, once, 64), 64);
    // The numbers of a 4-bit group are on its grid but for the F16 of its scale and mean, and a
    // group whose largest number is not at -8 may find a better grid.
    CHECK(relative_error(twice, once) < (is_q4(format) ? 0.02 : 1e-6));
  }
}

TEST_CASE("4-bit tiles of rows are Q4_0 for ggml, and say the same numbers as the kernels' tiles") {
  for (const std::int64_t head_dim : {32, 64, 96, 128}) {
    const std::vector<float> rows = random_rows(head_dim, 13, 0.7f);
    const std::vector<std::byte> keys = written(TileFormat::kQ4KeyRows, rows, head_dim);
    const std::vector<std::byte> values = written(TileFormat::kQ4ValueRows, rows, head_dim);
    CHECK(read(TileFormat::kQ4KeyRows, keys, head_dim) ==
          read(TileFormat::kQ4Keys, written(TileFormat::kQ4Keys, rows, head_dim), head_dim));
    const std::vector<float> by_tile = read(TileFormat::kQ4ValueRows, values, head_dim);
    CHECK(by_tile ==
          read(TileFormat::kQ4Values, written(TileFormat::kQ4Values, rows, head_dim), head_dim));

    std::vector<float> by_ggml(rows.size());
    ggml_get_type_traits(GGML_TYPE_Q4_0)
        ->to_float(values.data(), by_ggml.data(), std::ssize(by_ggml));
    for (int token = 0; token < kBlockTokens; ++token) {
      hadamard_rotate(by_ggml.data() + token * head_dim, head_dim);
    }
    CHECK(by_ggml == by_tile);
  }
}

TEST_CASE("Q8_0 tiles hold ggml's own rows") {
  const std::vector<float> rows = random_rows(96, 9);
  const std::vector<std::byte> tile = written(TileFormat::kQ8_0, rows, 96);
  std::vector<std::byte> expected(tile.size());
  ggml_quantize_chunk(GGML_TYPE_Q8_0, rows.data(), expected.data(), 0, kBlockTokens, 96, nullptr);
  // The vector code of ggml's CPU backend rounds halves to even, its reference away from 0.
  std::vector<float> by_ggml(rows.size());
  ggml_get_type_traits(GGML_TYPE_Q8_0)
      ->to_float(expected.data(), by_ggml.data(), std::ssize(by_ggml));
  CHECK(relative_error(read(TileFormat::kQ8_0, tile, 96), by_ggml) < 1e-4);
  ggml_get_type_traits_cpu(GGML_TYPE_Q8_0)
      ->from_float(rows.data(), expected.data(), std::ssize(rows));
  CHECK(tile == expected);
}

TEST_CASE("a row is written where the whole tile has it") {
  for (const TileFormat format : {TileFormat::kF16, TileFormat::kBF16, TileFormat::kQ8_0}) {
    const std::vector<float> rows = random_rows(64, 11);
    std::vector<std::byte> tile(tile_bytes(format, 64));
    for (const int token : {63, 0, 17}) {
      write_row(format, rows.data() + token * 64, 64, token, tile.data());
    }
    const std::vector<float> found = read(format, tile, 64);
    const std::vector<float> whole = read(format, written(format, rows, 64), 64);
    for (const std::size_t token : {0u, 1u, 17u, 63u}) {
      for (std::size_t d = 0; d < 64; ++d) {
        CHECK(found[token * 64 + d] == (token == 1 ? 0.0f : whole[token * 64 + d]));
      }
    }
  }
}

TEST_CASE("4-bit tiles keep what is hard: a common offset of keys, a large dim, zeros") {
  std::vector<float> keys = random_rows(64, 13);
  for (std::size_t i = 0; i < keys.size(); ++i) keys[i] += i % 64 == 5 ? 40.0f : 0.0f;
  const std::vector<float> found =
      read(TileFormat::kQ4Keys, written(TileFormat::kQ4Keys, keys, 64), 64);
  double squares = 0.0;
  for (std::size_t i = 0; i < keys.size(); ++i) {
    squares += std::pow(static_cast<double>(found[i]) - keys[i], 2);
  }
  // As without the offset, but for F16's rounding of a mean of 40.
  CHECK(std::sqrt(squares / static_cast<double>(keys.size())) < 0.09);

  std::vector<float> values = random_rows(64, 15);
  for (std::size_t d = 0; d < 64; ++d) values[64 * 9 + d] = d == 3 ? 100.0f : 0.0f;
  const std::vector<float> read_back =
      read(TileFormat::kQ4Values, written(TileFormat::kQ4Values, values, 64), 64);
  // One large number becomes 64 of equal size, which 4 bits hold exactly but for the scale's F16.
  CHECK(read_back[64 * 9 + 3] == doctest::Approx(100.0f).epsilon(2e-3));
  CHECK(std::fabs(read_back[64 * 9 + 4]) < 0.1f);

  for (const TileFormat format : kFormats) {
    const std::vector<float> zeros(64 * 64, 0.0f);
    CHECK(read(format, written(format, zeros, 64), 64) == zeros);
  }
}
