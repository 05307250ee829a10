#include "modularbase/kernels/linear.h"

#include <doctest/doctest.h>
#include <ggml-cpu.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "modularbase/kernels/linear_tile.h"
#include "tools/fenced_bytes.h"

namespace modularbase::kernels {
namespace {

using testing::FencedBytes;

constexpr float kUntouched = -12345.678f;
constexpr std::size_t kGuard = 64;  // floats before and after y

struct Shape {
  ggml_type type;
  std::int64_t n_in;
  std::vector<std::int64_t> n_out;
  std::int64_t n_rows;
  Epilogue epilogue = Epilogue::kNone;
  bool has_bias = false;
};

struct Matrix {
  std::int64_t n_out;
  std::unique_ptr<FencedBytes> bytes;
  std::vector<float> values;  // [n_in, n_out], what the bytes mean
  std::vector<float> bias;    // [n_out] or empty
};

/// Random weights, input and residual of one call, with a double-precision answer.
class Problem {
 public:
  explicit Problem(const Shape& shape) : shape_(shape) {
    for (std::int64_t n_out : shape.n_out) matrices_.push_back(make_matrix(n_out));
    const std::vector<float> x = random_floats(shape.n_in * shape.n_rows);
    x_ = std::make_unique<FencedBytes>(x.size() * sizeof(float));
    std::memcpy(x_->data(), x.data(), x.size() * sizeof(float));
    residual_ = random_floats(y_cols() * shape.n_rows);
  }

  const Shape& shape() const { return shape_; }
  const float* x() const { return static_cast<const float*>(x_->data()); }
  const std::vector<float>& residual() const { return residual_; }
  const std::vector<Matrix>& matrices() const { return matrices_; }
  std::int64_t y_cols() const {
    if (shape_.epilogue == Epilogue::kSwiGlu) return shape_.n_out[0];
    std::int64_t n = 0;
    for (std::int64_t n_out : shape_.n_out) n += n_out;
    return n;
  }

  /// Runs rows [row, row + n_rows) on n_threads threads; y has kGuard more floats at both ends.
  std::vector<float> run(std::int64_t row, std::int64_t n_rows, int n_threads,
                         bool in_place = false) const {
    std::vector<LinearWeight> weights;
    for (const Matrix& m : matrices_) {
      weights.push_back({.type = shape_.type,
                         .data = m.bytes->data(),
                         .n_out = m.n_out,
                         .bias = m.bias.empty() ? nullptr : m.bias.data()});
    }
    std::vector<float> y(static_cast<std::size_t>(n_rows * y_cols()) + 2 * kGuard, kUntouched);
    const float* residual = residual_.data() + row * y_cols();
    if (in_place) {
      std::copy_n(residual, n_rows * y_cols(), y.data() + kGuard);
      residual = y.data() + kGuard;
    }
    std::atomic<int> next_chunk{0};
    const LinearArgs args{
        .weights = weights.data(),
        .n_weights = static_cast<int>(weights.size()),
        .n_in = shape_.n_in,
        .n_rows = n_rows,
        .x = x() + row * shape_.n_in,
        .residual = shape_.epilogue == Epilogue::kAddResidual ? residual : nullptr,
        .y = y.data() + kGuard,
        .epilogue = shape_.epilogue,
        .next_chunk = &next_chunk};
    std::vector<std::thread> threads;
    for (int i = 1; i < n_threads; ++i)
      threads.emplace_back([&, i] { linear(args, i, n_threads); });
    linear(args, 0, n_threads);
    for (std::thread& thread : threads) thread.join();
    return y;
  }

  struct Answer {
    double value;
    double tolerance;
  };
  Answer expected(std::int64_t row, std::int64_t col) const {
    if (shape_.epilogue == Epilogue::kSwiGlu) {
      const Answer gate = product(matrices_[0], row, col), up = product(matrices_[1], row, col);
      const double silu = gate.value / (1.0 + std::exp(-gate.value));
      // The slope of silu is below 1.1; the vector exp adds 1e-6 of the result.
      return {silu * up.value, 1.1 * gate.tolerance * std::abs(up.value) +
                                   std::abs(silu) * up.tolerance +
                                   1e-6 * std::abs(silu * up.value) + 1e-12};
    }
    std::int64_t in_matrix = col;
    std::size_t m = 0;
    while (in_matrix >= matrices_[m].n_out) in_matrix -= matrices_[m++].n_out;
    Answer answer = product(matrices_[m], row, in_matrix);
    if (shape_.epilogue == Epilogue::kAddResidual) {
      answer.value +=
          static_cast<double>(residual_[static_cast<std::size_t>(row * y_cols() + col)]);
    }
    return answer;
  }

 private:
  std::vector<float> random_floats(std::int64_t n) {
    std::vector<float> values(static_cast<std::size_t>(n));
    std::normal_distribution<float> normal(0.0f, 1.0f);
    for (float& v : values) v = normal(random_);
    return values;
  }

  Matrix make_matrix(std::int64_t n_out) {
    Matrix m{
        .n_out = n_out, .bytes = nullptr, .values = random_floats(shape_.n_in * n_out), .bias = {}};
    const std::size_t n = m.values.size();
    m.bytes = std::make_unique<FencedBytes>(ggml_row_size(shape_.type, shape_.n_in) *
                                            static_cast<std::size_t>(n_out));
    ggml_quantize_chunk(shape_.type, m.values.data(), m.bytes->data(), 0, n_out, shape_.n_in,
                        nullptr);
    if (shape_.type != GGML_TYPE_F32) {
      ggml_get_type_traits(shape_.type)
          ->to_float(m.bytes->data(), m.values.data(), static_cast<std::int64_t>(n));
    }
    if (shape_.has_bias) m.bias = random_floats(n_out);
    return m;
  }

  Answer product(const Matrix& m, std::int64_t row, std::int64_t col) const {
    std::vector<float> rounded(static_cast<std::size_t>(shape_.n_in));
    round_linear_input(shape_.type, x() + row * shape_.n_in, shape_.n_in, rounded.data());
    double sum = 0.0, magnitude = 0.0;
    for (std::int64_t k = 0; k < shape_.n_in; ++k) {
      const double term =
          static_cast<double>(rounded[static_cast<std::size_t>(k)]) *
          static_cast<double>(m.values[static_cast<std::size_t>(col * shape_.n_in + k)]);
      sum += term;
      magnitude += std::abs(term);
    }
    if (!m.bias.empty()) sum += static_cast<double>(m.bias[static_cast<std::size_t>(col)]);
    // A lane adds up to n_in / kLanes terms and the tree a few more (the tile unit: all terms one
    // after the other), each addition within 2^-24 of the partial sum.
    const bool in_lanes = shape_.type != GGML_TYPE_BF16 && shape_.type != GGML_TYPE_F16;
    const double n_additions =
        static_cast<double>(shape_.n_in) / (in_lanes ? simd::kLanes : 1) + 8.0;
    // Q4_1 sums d q x and m x, of which each may be several times their sum.
    const double n_parts = ggml_is_quantized(shape_.type) ? 8.0 : 1.0;
    // The tile unit takes F16 as two BF16 numbers and leaves out the smallest of four products.
    const double left_out = shape_.type == GGML_TYPE_F16 ? 0x1p-16 * magnitude : 0.0;
    return {sum, n_additions * 0x1p-24 * (n_parts * magnitude + 8.0) + left_out};
  }

  Shape shape_;
  std::mt19937 random_{7};
  std::vector<Matrix> matrices_;
  std::unique_ptr<FencedBytes> x_;
  std::vector<float> residual_;
};

/// Compares every element with the double-precision answer and the guards with what was there
/// before.
void check_against_doubles(const Problem& problem, int n_threads, bool in_place = false) {
  const Shape& shape = problem.shape();
  INFO(ggml_type_name(shape.type), " n_in ", shape.n_in, " rows ", shape.n_rows, " threads ",
       n_threads);
  const std::vector<float> y = problem.run(0, shape.n_rows, n_threads, in_place);
  const auto n = static_cast<std::size_t>(shape.n_rows * problem.y_cols());
  REQUIRE(y.size() == n + 2 * kGuard);
  const auto is_untouched = [](float v) { return v == kUntouched; };
  CHECK(std::all_of(y.begin(), y.begin() + kGuard, is_untouched));
  CHECK(std::all_of(y.end() - kGuard, y.end(), is_untouched));
  int n_wrong = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const auto [value, tolerance] =
        problem.expected(static_cast<std::int64_t>(i) / problem.y_cols(),
                         static_cast<std::int64_t>(i) % problem.y_cols());
    const bool is_right =
        std::abs(static_cast<double>(y[kGuard + i]) - value) <= tolerance;  // false for a NaN
    if (!is_right && n_wrong++ == 0) {
      FAIL_CHECK("element ", i, " is ", y[kGuard + i], ", expected ", value, " +- ", tolerance);
    }
  }
  CHECK(n_wrong == 0);
}

const std::vector<ggml_type> kTypes = {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16};

/// Those that this build has a kernel for.
std::vector<ggml_type> quantised_types() {
  std::vector<ggml_type> types;
  for (ggml_type type : {GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_Q8_0}) {
    if (linear_supported(type)) types.push_back(type);
  }
  return types;
}

TEST_CASE("linear: quantised weights, every row count, tails, epilogues, threads") {
  for (ggml_type type : quantised_types()) {
    for (std::int64_t n_rows = 1; n_rows <= 20; ++n_rows) {
      check_against_doubles(Problem({type, 96, {45}, n_rows}), 1);
    }
    for (std::int64_t n_in : {32, 64, 160, 576}) {
      check_against_doubles(Problem({type, n_in, {37}, 1}), 1);
      check_against_doubles(Problem({type, n_in, {37}, 131}), 2);
    }
    for (std::int64_t n_out = 1; n_out <= 35; ++n_out) {
      check_against_doubles(Problem({type, 64, {n_out}, 3, Epilogue::kAddResidual, true}), 1);
    }
    check_against_doubles(Problem({type, 576, {576, 192, 192}, 2}), 2);
    check_against_doubles(Problem({type, 576, {1536, 1536}, 1, Epilogue::kSwiGlu}), 3);
  }
}

TEST_CASE("linear: quantised weights, a row alone and in a batch, bit for bit") {
  for (ggml_type type : quantised_types()) {
    const Problem problem({type, 224, {75}, 40, Epilogue::kAddResidual, true});
    for (std::int64_t n_rows : {2, 5, 8, 9, 40}) {
      const std::vector<float> batch = problem.run(0, n_rows, 2);
      for (std::int64_t row = 0; row < n_rows; ++row) {
        const std::vector<float> alone = problem.run(row, 1, 1);
        REQUIRE(std::equal(alone.begin() + kGuard, alone.end() - kGuard,
                           batch.begin() + kGuard + row * 75));
      }
    }
  }
}

TEST_CASE("round_linear_input: within half a step of each block's largest element") {
  std::mt19937 random(3);
  std::normal_distribution<float> normal(0.0f, 1.0f);
  for (ggml_type type : quantised_types()) {
    std::vector<float> x(96, 0.0f), rounded(96);
    for (std::size_t i = 32; i < x.size(); ++i) x[i] = normal(random);  // one block of zeros
    round_linear_input(type, x.data(), 96, rounded.data());
    for (std::size_t block = 0; block < 96; block += 32) {
      float max = 0.0f;
      for (std::size_t i = block; i < block + 32; ++i) max = std::max(max, std::abs(x[i]));
      for (std::size_t i = block; i < block + 32; ++i) {
        CHECK(std::abs(rounded[i] - x[i]) <= max * (0.5f / 127.0f) * 1.0001f);
      }
    }
  }
}

TEST_CASE("linear: every row count, odd sizes, against double precision") {
  for (ggml_type type : kTypes) {
    for (std::int64_t n_rows = 1; n_rows <= 20; ++n_rows) {
      check_against_doubles(Problem({type, 67, {45}, n_rows}), 1);
    }
    for (std::int64_t n_rows : {31, 48, 70, 131})
      check_against_doubles(Problem({type, 96, {37}, n_rows}), 1);
  }
}

TEST_CASE("linear: every tail of n_in and n_out") {
  for (ggml_type type : kTypes) {
    for (std::int64_t n_in = 1; n_in <= 66; ++n_in)
      check_against_doubles(Problem({type, n_in, {5}, 4}), 1);
    for (std::int64_t n_out = 1; n_out <= 35; ++n_out) {
      check_against_doubles(Problem({type, 40, {n_out}, 1}), 1);
      check_against_doubles(Problem({type, 40, {n_out}, 10}), 2);
    }
  }
}

TEST_CASE("linear: one to three weights, biases and epilogues") {
  for (ggml_type type : kTypes) {
    for (std::int64_t n_rows : {1, 3, 7, 34}) {
      for (int n_threads : {1, 2, 4}) {
        for (bool has_bias : {false, true}) {
          const auto check = [&](std::vector<std::int64_t> n_out, Epilogue epilogue) {
            check_against_doubles(Problem({type, 72, std::move(n_out), n_rows, epilogue, has_bias}),
                                  n_threads);
          };
          check({50}, Epilogue::kNone);
          check({64, 24}, Epilogue::kNone);
          check({40, 9, 17}, Epilogue::kNone);
          check({83}, Epilogue::kAddResidual);
          check({77, 77}, Epilogue::kSwiGlu);
        }
      }
    }
  }
}

TEST_CASE("linear: many rows of 16 bits, odd counts, tails and several blocks of x") {
  for (ggml_type type : {GGML_TYPE_BF16, GGML_TYPE_F16}) {
    for (std::int64_t n_rows : {9, 16, 17, 33, 130, 300}) {
      check_against_doubles(Problem({type, 64, {77}, n_rows}), 1);
      check_against_doubles(Problem({type, 160, {33, 64}, n_rows}), 2);
      check_against_doubles(Problem({type, 32, {31}, n_rows, Epilogue::kAddResidual, true}), 3);
    }
    check_against_doubles(Problem({type, 576, {96, 96}, 200, Epilogue::kSwiGlu, true}), 2);
  }
}

TEST_CASE("linear: the residual may be y itself") {
  for (std::int64_t n_rows : {1, 29}) {
    check_against_doubles(Problem({GGML_TYPE_BF16, 64, {70}, n_rows, Epilogue::kAddResidual}), 2,
                          true);
  }
}

TEST_CASE("linear: the shapes of SmolLM2-135M with several chunks a thread") {
  for (ggml_type type : kTypes) {
    check_against_doubles(Problem({type, 576, {576, 192, 192}, 2}), 2);
    check_against_doubles(Problem({type, 576, {1536, 1536}, 1, Epilogue::kSwiGlu}), 3);
    check_against_doubles(Problem({type, 1536, {576}, 9, Epilogue::kAddResidual}), 2);
  }
}

TEST_CASE("linear: a row alone and in a batch, on any number of threads, bit for bit") {
  for (ggml_type type : kTypes) {
    for (Epilogue epilogue : {Epilogue::kAddResidual, Epilogue::kSwiGlu}) {
      std::vector<std::int64_t> n_out = {75};
      if (epilogue == Epilogue::kSwiGlu) n_out.push_back(75);
      const Problem problem({type, 203, n_out, 70, epilogue, true});
      std::vector<std::vector<float>> alone;
      for (std::int64_t row = 0; row < 70; ++row) alone.push_back(problem.run(row, 1, 1));
      for (std::int64_t n_rows = 1; n_rows <= 70; ++n_rows) {
        const int n_threads = static_cast<int>(n_rows % 4) + 1;
        const std::vector<float> batch = problem.run(0, n_rows, n_threads);
        for (std::int64_t row = 0; row < n_rows; ++row) {
          CAPTURE(n_rows);
          CAPTURE(row);
          const float* in_batch = batch.data() + kGuard + row * problem.y_cols();
          const float* by_itself = alone[static_cast<std::size_t>(row)].data() + kGuard;
          REQUIRE(std::memcmp(in_batch, by_itself,
                              static_cast<std::size_t>(problem.y_cols()) * sizeof(float)) == 0);
        }
      }
    }
  }
}

struct ContextFree {
  void operator()(ggml_context* context) const { ggml_free(context); }
};

TEST_CASE("linear: agrees with ggml_mul_mat") {
  ggml_cpu_init();
  std::vector<ggml_type> types = quantised_types();
  types.insert(types.end(), kTypes.begin(), kTypes.end());
  for (ggml_type type : types) {
    for (std::int64_t n_rows : {1, 4, 33}) {
      const Problem problem({type, 192, {96}, n_rows});
      std::unique_ptr<ggml_context, ContextFree> context(ggml_init({16 << 20, nullptr, false}));
      ggml_tensor* w = ggml_new_tensor_2d(context.get(), type, 192, 96);
      ggml_tensor* x = ggml_new_tensor_2d(context.get(), GGML_TYPE_F32, 192, n_rows);
      std::memcpy(w->data, problem.matrices()[0].bytes->data(), ggml_nbytes(w));
      std::memcpy(x->data, problem.x(), ggml_nbytes(x));
      ggml_tensor* product = ggml_mul_mat(context.get(), w, x);
      ggml_cgraph* graph = ggml_new_graph(context.get());
      ggml_build_forward_expand(graph, product);
      REQUIRE(ggml_graph_compute_with_ctx(context.get(), graph, 1) == GGML_STATUS_SUCCESS);
      const std::vector<float> y = problem.run(0, n_rows, 1);
      // ggml rounds x to the type of the weights: 2^-9 (BF16) or 2^-12 (F16) of each of 192 terms
      // of size about 1, whose errors add like a random walk; six standard deviations. Of a block's
      // 8 bits it rounds the scale to F16, and a tie may go the other way.
      const double rounding = type == GGML_TYPE_F16 || type == GGML_TYPE_F32 ? 0x1p-12 : 0x1p-9;
      const double tolerance = 6.0 * std::sqrt(192.0) * rounding;
      double worst = 0.0;
      for (std::int64_t i = 0; i < 96 * n_rows; ++i) {
        const float theirs = static_cast<const float*>(product->data)[i];
        worst = std::max(
            worst, static_cast<double>(std::abs(theirs - y[kGuard + static_cast<std::size_t>(i)])));
      }
      CAPTURE(ggml_type_name(type));
      CHECK(worst <= tolerance);
    }
  }
}

TEST_CASE("linear: no rows, no work") {
  const Problem problem({GGML_TYPE_F16, 64, {32}, 1});
  const std::vector<float> y = problem.run(0, 0, 1);
  CHECK(std::all_of(y.begin(), y.end(), [](float v) { return v == kUntouched; }));
}

TEST_CASE("linear_supported: the types with a kernel") {
  for (ggml_type type : kTypes) CHECK(linear_supported(type));
  CHECK_FALSE(linear_supported(GGML_TYPE_Q2_K));
}

}  // namespace
}  // namespace modularbase::kernels
