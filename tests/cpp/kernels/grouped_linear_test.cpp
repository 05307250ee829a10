#include "modularbase/kernels/grouped_linear.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "modularbase/kernels/linear.h"
#include "modularbase/kernels/simd.h"
#include "tools/fenced_bytes.h"

namespace modularbase::kernels {
namespace {

using testing::FencedBytes;

constexpr float kUntouched = -12345.678f;
constexpr std::int64_t kSpareRows = 3;  // of y, that no entry gives

struct Shape {
  ggml_type type;
  std::int64_t n_in;
  std::int64_t n_out;
  std::vector<std::int32_t> group_sizes;
  bool has_up = false;
};

struct Matrix {
  std::unique_ptr<FencedBytes> bytes;
  std::vector<float> values;  // [n_in, n_out], what the bytes mean
};

/// Random weights, one or two a group; entries that take any row of x and give any row of y.
class Problem {
 public:
  explicit Problem(const Shape& shape) : shape_(shape) {
    std::int32_t n = 0;
    for (const std::int32_t size : shape.group_sizes) {
      weights_.push_back(make_matrix());
      if (shape.has_up) up_weights_.push_back(make_matrix());
      groups_.push_back({weights_.back().bytes->data(),
                         shape.has_up ? up_weights_.back().bytes->data() : nullptr, n, size});
      n += size;
    }
    const std::int64_t n_x_rows = n / 2 + 1;  // some rows are taken twice
    x_ = random_floats(shape.n_in * n_x_rows);
    for (std::int32_t i = 0; i < n; ++i) {
      x_rows_.push_back(static_cast<std::int32_t>(random_() % static_cast<unsigned>(n_x_rows)));
    }
    y_rows_.resize(static_cast<std::size_t>(n + kSpareRows));
    std::iota(y_rows_.begin(), y_rows_.end(), 0);
    std::ranges::shuffle(y_rows_, random_);
  }

  const std::vector<RowGroup>& groups() const { return groups_; }
  std::int64_t n_entries() const { return std::ssize(x_rows_); }
  std::size_t y_begin(std::int64_t entry) const {
    return static_cast<std::size_t>(y_rows_[static_cast<std::size_t>(entry)] * shape_.n_out);
  }

  /// y [n_out, n_entries + kSpareRows]
  std::vector<float> run(std::span<const RowGroup> groups, int n_threads) const {
    std::vector<float> y(y_rows_.size() * static_cast<std::size_t>(shape_.n_out), kUntouched);
    std::atomic<int> next_chunk{0};
    const GroupedLinearArgs args{.type = shape_.type,
                                 .n_in = shape_.n_in,
                                 .n_out = shape_.n_out,
                                 .groups = groups,
                                 .x_rows = x_rows_.data(),
                                 .y_rows = y_rows_.data(),
                                 .x = x_.data(),
                                 .y = y.data(),
                                 .next_chunk = &next_chunk};
    std::vector<std::thread> threads;
    for (int i = 1; i < n_threads; ++i)
      threads.emplace_back([&] { grouped_linear(args, n_threads); });
    grouped_linear(args, n_threads);
    for (std::thread& thread : threads) thread.join();
    return y;
  }

  struct Answer {
    double value;
    double tolerance;
  };
  Answer expected(std::size_t group, std::int64_t entry, std::int64_t col) const {
    const Answer gate = product(weights_[group], entry, col);
    if (!shape_.has_up) return gate;
    const Answer up = product(up_weights_[group], entry, col);
    const double silu = gate.value / (1.0 + std::exp(-gate.value));
    // The slope of silu is below 1.1; the vector exp adds 1e-6 of the result.
    return {silu * up.value, 1.1 * gate.tolerance * std::abs(up.value) +
                                 std::abs(silu) * up.tolerance + 1e-6 * std::abs(silu * up.value) +
                                 1e-12};
  }

 private:
  std::vector<float> random_floats(std::int64_t n) {
    std::normal_distribution<float> normal;
    std::vector<float> values(static_cast<std::size_t>(n));
    for (float& value : values) value = normal(random_);
    return values;
  }

  Matrix make_matrix() {
    Matrix m{nullptr, random_floats(shape_.n_in * shape_.n_out)};
    m.bytes = std::make_unique<FencedBytes>(ggml_row_size(shape_.type, shape_.n_in) *
                                            static_cast<std::size_t>(shape_.n_out));
    ggml_quantize_chunk(shape_.type, m.values.data(), m.bytes->data(), 0, shape_.n_out, shape_.n_in,
                        nullptr);
    if (shape_.type != GGML_TYPE_F32) {
      ggml_get_type_traits(shape_.type)
          ->to_float(m.bytes->data(), m.values.data(), std::ssize(m.values));
    }
    return m;
  }

  Answer product(const Matrix& m, std::int64_t entry, std::int64_t col) const {
    const float* x = x_.data() + x_rows_[static_cast<std::size_t>(entry)] * shape_.n_in;
    std::vector<float> rounded(static_cast<std::size_t>(shape_.n_in));
    round_linear_input(shape_.type, x, shape_.n_in, rounded.data());
    double sum = 0.0, magnitude = 0.0;
    for (std::int64_t k = 0; k < shape_.n_in; ++k) {
      const double term =
          static_cast<double>(rounded[static_cast<std::size_t>(k)]) *
          static_cast<double>(m.values[static_cast<std::size_t>(col * shape_.n_in + k)]);
      sum += term;
      magnitude += std::abs(term);
    }
    // As in linear_test.cpp: a lane's additions and the tree's, each within 2^-24 of the partial
    // sum; the tile unit adds all terms one after the other, and of F16 leaves out a part.
    const bool is_16_bit = shape_.type == GGML_TYPE_BF16 || shape_.type == GGML_TYPE_F16;
    const double n_additions =
        static_cast<double>(shape_.n_in) / (is_16_bit ? 1 : simd::kLanes) + 8.0;
    const double n_parts = ggml_is_quantized(shape_.type) ? 8.0 : 1.0;
    const double left_out = shape_.type == GGML_TYPE_F16 ? 0x1p-16 * magnitude : 0.0;
    return {sum, n_additions * 0x1p-24 * (n_parts * magnitude + 8.0) + left_out};
  }

  Shape shape_;
  std::mt19937 random_{11};
  std::vector<Matrix> weights_;
  std::vector<Matrix> up_weights_;
  std::vector<RowGroup> groups_;
  std::vector<float> x_;
  std::vector<std::int32_t> x_rows_;
  std::vector<std::int32_t> y_rows_;  // of the entries, then the spare ones
};

void check_against_doubles(const Shape& shape, int n_threads) {
  const Problem problem(shape);
  INFO(ggml_type_name(shape.type), " n_in ", shape.n_in, " n_out ", shape.n_out, " up ",
       shape.has_up, " entries ", problem.n_entries(), " threads ", n_threads);
  const std::vector<float> y = problem.run(problem.groups(), n_threads);
  int n_wrong = 0;
  for (std::size_t g = 0; g < problem.groups().size(); ++g) {
    const RowGroup& group = problem.groups()[g];
    for (std::int64_t entry = group.first; entry < group.first + group.n; ++entry) {
      for (std::int64_t col = 0; col < shape.n_out; ++col) {
        const auto [value, tolerance] = problem.expected(g, entry, col);
        const float found = y[problem.y_begin(entry) + static_cast<std::size_t>(col)];
        // Negated, so that a NaN is wrong.
        if (!(std::abs(static_cast<double>(found) - value) <= tolerance) && n_wrong++ == 0) {
          FAIL_CHECK("entry ", entry, " column ", col, " is ", found, ", expected ", value, " +- ",
                     tolerance);
        }
      }
    }
  }
  CHECK(n_wrong == 0);
  for (std::int64_t i = 0; i < kSpareRows; ++i) {
    const auto at =
        y.begin() + static_cast<std::ptrdiff_t>(problem.y_begin(problem.n_entries() + i));
    CHECK(std::all_of(at, at + shape.n_out, [](float v) { return v == kUntouched; }));
  }
}

const std::vector<ggml_type> kTypes = {GGML_TYPE_F32,  GGML_TYPE_F16,  GGML_TYPE_BF16,
                                       GGML_TYPE_Q4_0, GGML_TYPE_Q8_0, GGML_TYPE_Q4_K};

TEST_CASE("grouped_linear: one group of every size") {
  for (const ggml_type type : kTypes) {
    for (std::int32_t n = 1; n <= 40; ++n) {
      check_against_doubles({type, 256, 37, {n}, n % 2 == 0}, 1 + n % 3);
    }
  }
}

TEST_CASE("grouped_linear: groups of different sizes, on one to three threads") {
  for (const ggml_type type : kTypes) {
    for (const int n_threads : {1, 2, 3}) {
      check_against_doubles({type, 512, 96, {1, 7, 0, 2, 40, 8, 9}}, n_threads);
      check_against_doubles({type, 256, 256, {3, 1, 1, 12}, true}, n_threads);
      check_against_doubles({type, 256, 5, {1, 1, 1}, true}, n_threads);
    }
  }
}

TEST_CASE("grouped_linear: a group of several blocks of x") {
  for (const ggml_type type : kTypes) check_against_doubles({type, 1024, 33, {300, 1, 130}}, 2);
}

TEST_CASE("grouped_linear: floats of a width that is no multiple of a vector") {
  for (const ggml_type type : {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16}) {
    check_against_doubles({type, 67, 45, {1, 5, 12}, true}, 2);
  }
}

TEST_CASE("grouped_linear: a row alone and in its group, bit for bit") {
  for (const ggml_type type : kTypes) {
    for (const bool has_up : {false, true}) {
      CAPTURE(ggml_type_name(type));
      // Where more than eight rows a group go to a tile unit, sums of 16 bits have another order.
      const bool is_16_bit = type == GGML_TYPE_F16 || type == GGML_TYPE_BF16;
      const std::vector<std::int32_t> sizes =
          is_16_bit ? std::vector<std::int32_t>{8, 1, 5} : std::vector<std::int32_t>{40, 1, 9, 130};
      const Shape shape{type, 256, 75, sizes, has_up};
      const Problem problem(shape);
      const std::vector<float> together = problem.run(problem.groups(), 3);
      for (const RowGroup& group : problem.groups()) {
        for (std::int32_t entry = group.first; entry < group.first + group.n; ++entry) {
          const RowGroup single{group.weight, group.up_weight, entry, 1};
          const std::vector<float> alone = problem.run({&single, 1}, 1);
          const std::size_t at = problem.y_begin(entry);
          REQUIRE(std::memcmp(alone.data() + at, together.data() + at, 75 * sizeof(float)) == 0);
        }
      }
    }
  }
}

TEST_CASE("grouped_linear: no groups, no work") {
  const Problem problem({GGML_TYPE_F16, 256, 32, {2}});
  const std::vector<float> y = problem.run({}, 1);
  CHECK(std::ranges::all_of(y, [](float v) { return v == kUntouched; }));
}

}  // namespace
}  // namespace modularbase::kernels
