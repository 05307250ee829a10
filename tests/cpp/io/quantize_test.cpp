#include "modularbase/io/quantize.h"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <random>
#include <string>

#include "modularbase/core/errors.h"

using namespace modularbase;

namespace {

std::vector<float> normal_values(std::size_t n) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::vector<float> values(n);
  for (float& value : values) value = normal(random);
  return values;
}

double relative_rms(const std::vector<float>& wanted, const std::vector<float>& found) {
  double error = 0, size = 0;
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    error += std::pow(wanted[i] - found[i], 2);
    size += std::pow(wanted[i], 2);
  }
  return std::sqrt(error / size);
}

std::string refused_field(const std::vector<float>& values, std::int64_t n_per_row,
                          const char* type) {
  try {
    quantize(values, n_per_row, type);
  } catch (const InvalidRequestError& e) {
    return e.field;
  }
  return "accepted";
}

}  // namespace

TEST_CASE("rounding keeps what the type's bits can hold") {
  const std::vector<float> values = normal_values(4 * 512);
  struct Expectation {
    const char* type;
    std::size_t n_bytes;  // of 2048 numbers
    double bound;         // half a unit in the last place; for blocks, half a step of their range
  };
  for (const auto& [type, n_bytes, bound] : {Expectation{"f32", 8192, 0.0},
                                             {"f16", 4096, 1.0 / 2048},
                                             {"bf16", 4096, 1.0 / 256},
                                             {"q8_0", 2048 / 32 * 34, 0.01},
                                             {"q4_0", 2048 / 32 * 18, 0.11},
                                             {"q4_k", 2048 / 256 * 144, 0.09}}) {
    const std::vector<std::byte> bytes = quantize(values, 512, type);
    CHECK(bytes.size() == n_bytes);
    const double error = relative_rms(values, dequantize(bytes, type));
    CHECK_MESSAGE(error <= bound, type);
    CHECK_MESSAGE((bound == 0.0 || error > bound / 20), type);
  }
}

TEST_CASE("what cannot be rounded is refused by name") {
  const std::vector<float> values = normal_values(512);
  CHECK(refused_field(values, 256, "q4_k") == "accepted");
  CHECK(refused_field(values, 256, "q3_k") == "type");
  CHECK(refused_field(values, 128, "q4_k") == "row");
  CHECK(refused_field(values, 0, "f16") == "row");
  CHECK(refused_field(values, 384, "q8_0") == "values");
  CHECK(refused_field({1.0f, std::numeric_limits<float>::quiet_NaN()}, 2, "f16") == "values");
  CHECK(refused_field({1.0f, 1e30f}, 2, "f16") == "values");
  CHECK(refused_field(std::vector<float>(32, 1e30f), 32, "q8_0") == "values");
  CHECK(quantize({}, 256, "q4_0").empty());
  CHECK_THROWS_AS(dequantize(std::vector<std::byte>(17), "q4_0"), InvalidRequestError);
}

TEST_CASE("bytes at any address are read") {
  std::vector<std::byte> bytes = quantize(normal_values(256), 256, "q4_k");
  const std::vector<float> wanted = dequantize(bytes, "q4_k");
  bytes.insert(bytes.begin(), std::byte{0});
  CHECK(dequantize(std::span<const std::byte>(bytes).subspan(1), "q4_k") == wanted);
}
