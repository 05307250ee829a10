#include "modularbase/kernels/attention.h"

#include <doctest/doctest.h>
#include <ggml.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <thread>
#include <vector>

#include "cpp/kernels/exact_layer.h"
#include "modularbase/kernels/attention_scratch.h"

using namespace modularbase::kernels;

namespace {

/// A cache and a batch of spans over it, with random contents.
struct Case {
  std::int64_t n_head, n_head_kv, head_dim;
  ggml_type type;
  std::vector<AttentionSpan> spans;
  std::vector<std::vector<std::int32_t>> tables;
  std::vector<std::uint16_t> k, v;
  std::vector<float> qkv;
  std::int64_t n_rows = 0;

  struct Span {
    int pos0, n_rows;
  };

  Case(std::int64_t heads, std::int64_t kv_heads, std::int64_t dim, ggml_type kv_type,
       const std::vector<Span>& wanted, unsigned seed, float scale = 1.0f)
      : n_head(heads), n_head_kv(kv_heads), head_dim(dim), type(kv_type) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0.0f, scale);
    std::vector<std::int32_t> blocks;
    for (const Span& span : wanted) {
      const int n = (span.pos0 + span.n_rows + kBlockTokens - 1) / kBlockTokens;
      for (int i = 0; i < n; ++i) blocks.push_back(static_cast<std::int32_t>(blocks.size()));
    }
    std::shuffle(blocks.begin(), blocks.end(), random);
    const std::size_t n_elements =
        blocks.size() * static_cast<std::size_t>(n_head_kv * kBlockTokens * head_dim);
    // What no row may see is NaN: reading it would show.
    k.assign(n_elements, 0x7fff);
    v.assign(n_elements, 0x7fff);
    std::size_t next = 0;
    for (const Span& span : wanted) {
      const int end = span.pos0 + span.n_rows;
      const auto n = static_cast<std::size_t>((end + kBlockTokens - 1) / kBlockTokens);
      tables.emplace_back(blocks.begin() + static_cast<std::ptrdiff_t>(next),
                          blocks.begin() + static_cast<std::ptrdiff_t>(next + n));
      next += n;
      for (int position = 0; position < end; ++position) {
        for (std::int64_t i = 0; i < n_head_kv * head_dim; ++i) {
          const std::size_t at = index(tables.size() - 1, i / head_dim, position, i % head_dim);
          k[at] = encode(normal(random));
          v[at] = encode(normal(random));
        }
      }
    }
    for (std::size_t i = 0; i < wanted.size(); ++i) {
      spans.push_back(
          {static_cast<std::int32_t>(n_rows), wanted[i].n_rows, wanted[i].pos0, tables[i].data()});
      n_rows += wanted[i].n_rows;
    }
    qkv.resize(static_cast<std::size_t>(n_rows * stride()));
    for (float& value : qkv) value = normal(random);
  }

  std::int64_t stride() const { return (n_head + 2 * n_head_kv) * head_dim; }

  std::size_t index(std::size_t span, std::int64_t head, int position, std::int64_t d) const {
    const std::int32_t block = tables[span][static_cast<std::size_t>(position / kBlockTokens)];
    return static_cast<std::size_t>(
        ((block * n_head_kv + head) * kBlockTokens + position % kBlockTokens) * head_dim + d);
  }
  std::uint16_t encode(float value) const {
    return type == GGML_TYPE_F16 ? ggml_fp32_to_fp16(value) : ggml_fp32_to_bf16(value).bits;
  }
  float decode(std::uint16_t bits) const {
    return type == GGML_TYPE_F16 ? ggml_fp16_to_fp32(bits) : ggml_bf16_to_fp32(ggml_bf16_t{bits});
  }

  KvLayer layer() {
    const TileFormat format = type == GGML_TYPE_F16 ? TileFormat::kF16 : TileFormat::kBF16;
    return exact_layer(format, k.data(), v.data(), n_head_kv, head_dim);
  }

  std::vector<float> run(int nth) {
    AttentionBatch batch{spans.data(), static_cast<int>(spans.size()), n_rows, nullptr, nullptr};
    AttentionScratch scratch;
    scratch.plan(batch, n_head, n_head_kv, head_dim);
    std::atomic<int> next{0};
    std::vector<float> out(static_cast<std::size_t>(n_rows * n_head * head_dim), NAN);
    const AttentionArgs args{.batch = &batch,
                             .kv = layer(),
                             .layer = 0,
                             .n_head = n_head,
                             .qkv_stride = stride(),
                             .qkv = qkv.data(),
                             .scale = 1.0f / std::sqrt(static_cast<float>(head_dim)),
                             .out = out.data(),
                             .next_chunk = &next,
                             .scratch = &scratch};
    std::vector<std::jthread> threads;
    for (int i = 1; i < nth; ++i)
      threads.emplace_back([&args, i, nth] { attention(args, i, nth); });
    attention(args, 0, nth);
    threads.clear();
    return out;
  }

  /// Softmax attention in double, straight from the definition.
  std::vector<float> expected() const {
    std::vector<float> out, keys, values;
    for (const std::uint16_t bits : k) keys.push_back(decode(bits));
    for (const std::uint16_t bits : v) values.push_back(decode(bits));
    for (std::size_t s = 0; s < spans.size(); ++s) {
      for (int row = 0; row < spans[s].n_rows; ++row) {
        for (std::int64_t head = 0; head < n_head; ++head)
          expect_head(s, row, head, keys.data(), values.data(), out);
      }
    }
    return out;
  }

  void expect_head(std::size_t s, int row, std::int64_t head, const float* keys,
                   const float* values, std::vector<float>& out) const {
    const std::int64_t kv_head = head / (n_head / n_head_kv);
    const float* q = qkv.data() + (spans[s].row0 + row) * stride() + head * head_dim;
    const int n = spans[s].pos0 + row + 1;
    std::vector<double> weights(static_cast<std::size_t>(n));
    for (int p = 0; p < n; ++p) {
      const float* key = keys + index(s, kv_head, p, 0);
      double dot = 0;
      for (std::int64_t d = 0; d < head_dim; ++d) dot += static_cast<double>(q[d]) * key[d];
      weights[static_cast<std::size_t>(p)] = dot / std::sqrt(static_cast<double>(head_dim));
    }
    const double largest = *std::max_element(weights.begin(), weights.end());
    double sum = 0;
    for (double& weight : weights) sum += weight = std::exp(weight - largest);
    for (std::int64_t d = 0; d < head_dim; ++d) {
      double value = 0;
      for (int p = 0; p < n; ++p) {
        value += weights[static_cast<std::size_t>(p)] * values[index(s, kv_head, p, d)];
      }
      out.push_back(static_cast<float>(value / sum));
    }
  }
};

// F32 sums over at most a few hundred positions and dimensions of values near 1.
constexpr float kTolerance = 2e-4f;

void check_close(const std::vector<float>& found, const std::vector<float>& expected) {
  REQUIRE(found.size() == expected.size());
  float worst = 0.0f;
  bool finite = true;
  for (std::size_t i = 0; i < found.size(); ++i) {
    finite = finite && std::isfinite(found[i]);
    worst = std::max(worst, std::fabs(found[i] - expected[i]));
  }
  CHECK(finite);
  CHECK(worst < kTolerance);
}

}  // namespace

TEST_CASE("attention equals its definition: decoding, tiles and both in one batch") {
  const std::vector<Case::Span> mixed = {{0, 1},  {63, 1}, {64, 1},   {700, 1}, {255, 3},
                                         {0, 40}, {5, 8},  {100, 70}, {250, 7}};
  unsigned seed = 1;
  for (const auto& [n_head, n_head_kv] : {std::pair{9, 3}, {4, 4}, {14, 2}, {8, 1}}) {
    for (const std::int64_t head_dim : {64, 80, 128}) {
      for (const ggml_type type : {GGML_TYPE_F16, GGML_TYPE_BF16}) {
        CAPTURE(n_head);
        CAPTURE(head_dim);
        Case c(n_head, n_head_kv, head_dim, type, mixed, ++seed);
        check_close(c.run(1 + static_cast<int>(seed % 4)), c.expected());
      }
    }
  }
}

TEST_CASE("scores far apart neither overflow nor become NaN") {
  Case c(4, 2, 64, GGML_TYPE_F16, {{300, 1}, {0, 60}}, 3, 30.0f);
  const std::vector<float> found = c.run(2);
  CHECK(std::all_of(found.begin(), found.end(), [](float value) { return std::isfinite(value); }));
}

TEST_CASE("a decoding row gives the same bits alone, in a batch, and with any number of threads") {
  Case batch(9, 3, 64, GGML_TYPE_F16, {{900, 1}, {0, 30}, {70, 2}}, 5);
  const std::vector<float> one = batch.run(1);
  for (int nth = 2; nth <= 4; ++nth) CHECK(batch.run(nth) == one);
  Case alone = batch;
  alone.spans = {batch.spans[0]};
  alone.n_rows = 1;
  const std::vector<float> row = alone.run(2);
  CHECK(std::equal(row.begin(), row.end(), one.begin()));
}

TEST_CASE("rope_store rotates, normalises and writes what ggml's definition says") {
  constexpr std::int64_t kHeadDim = 16, kRopeDim = 12;
  for (const RopeStyle style : {RopeStyle::kNormal, RopeStyle::kNeox}) {
    Case c(2, 1, kHeadDim, GGML_TYPE_F16, {{70, 2}}, 9);
    const std::vector<float> before = c.qkv;
    std::vector<float> cos, sin, norm(kHeadDim, 2.0f);
    for (int row = 0; row < 2; ++row) {
      for (int i = 0; i < kRopeDim / 2; ++i) {
        const double angle = (70 + row) * std::pow(100.0, -2.0 * i / kRopeDim);
        cos.push_back(static_cast<float>(std::cos(angle)));
        sin.push_back(static_cast<float>(std::sin(angle)));
      }
    }
    AttentionBatch batch{c.spans.data(), 1, 2, cos.data(), sin.data()};
    const KvLayer kv = c.layer();
    for (int ith = 0; ith < 3; ++ith) {
      rope_store({&batch, kv, 2, kRopeDim, style, norm.data(), nullptr, 1e-6f, 0, c.qkv.data()},
                 ith, 3);
    }
    for (int row = 0; row < 2; ++row) {
      for (int head = 0; head < 3; ++head) {  // two of q, one of k
        const float* x = before.data() + row * c.stride() + head * kHeadDim;
        double squares = 1e-6 * kHeadDim;
        for (int d = 0; d < kHeadDim; ++d) squares += static_cast<double>(x[d]) * x[d];
        const double scale = head < 2 ? 2.0 / std::sqrt(squares / kHeadDim) : 1.0;
        for (int d = 0; d < kHeadDim; ++d) {
          double expected = x[d] * scale;
          if (d < kRopeDim) {
            const int pair = style == RopeStyle::kNormal ? d / 2 : d % (kRopeDim / 2);
            const bool is_first = style == RopeStyle::kNormal ? d % 2 == 0 : d < kRopeDim / 2;
            const int gap = style == RopeStyle::kNormal ? 1 : kRopeDim / 2;
            const double other = x[is_first ? d + gap : d - gap] * scale;
            const auto at = static_cast<std::size_t>(row * kRopeDim / 2 + pair);
            expected = expected * cos[at] + (is_first ? -other : other) * sin[at];
          }
          const float found =
              head < 2 ? c.qkv[static_cast<std::size_t>(row * c.stride() + head * kHeadDim + d)]
                       : c.decode(c.k[c.index(0, 0, 70 + row, d)]);
          // F16 keeps 11 bits of the key.
          CHECK(std::fabs(found - expected) < (head < 2 ? 1e-5 : 4e-3));
        }
      }
      for (int d = 0; d < kHeadDim; ++d) {
        const float value = before[static_cast<std::size_t>(row * c.stride() + 3 * kHeadDim + d)];
        CHECK(c.decode(c.v[c.index(0, 0, 70 + row, d)]) == doctest::Approx(value).epsilon(1e-3));
      }
    }
  }
}

TEST_CASE("rope_store keeps rows in 8 bits, and in the window the queries that the stride picks") {
  constexpr std::int64_t kHeadDim = 32, kHeads = 2, kWindowRows = 2;
  constexpr int kRows = 7, kFirst = 62, kStride = 2, kLayer = 1;
  std::vector<std::byte> tiles(2 * 2 * tile_bytes(TileFormat::kQ8Keys, kHeadDim));
  KvLayer kv{.n_head_kv = 1, .head_dim = kHeadDim, .tiers = {}};
  kv.tiers[kExactTier] = {.k_format = TileFormat::kQ8Keys,
                          .v_format = TileFormat::kQ8_0,
                          .k = tiles.data(),
                          .v = tiles.data() + tiles.size() / 2,
                          .log_weight = nullptr,
                          .block_stride = tiles.size() / 4};
  std::vector<std::uint16_t> queries(kHeadDim * kHeads * kWindowRows * (kLayer + 1), 0x7fff);
  const QueryWindow window{queries.data(), nullptr, kWindowRows, kStride};
  const std::int32_t table[] = {1, 0};
  const AttentionSpan span{
      .row0 = 0, .n_rows = kRows, .pos0 = kFirst, .block_table = table, .window = &window};
  // Angles of zero: nothing rotates.
  const std::vector<float> cos(kRows * kHeadDim / 2, 1.0f), sin(cos.size(), 0.0f);
  const AttentionBatch batch{&span, 1, kRows, cos.data(), sin.data()};
  std::mt19937 random(4);
  std::normal_distribution<float> normal;
  std::vector<float> qkv(kRows * 4 * kHeadDim);
  for (float& value : qkv) value = normal(random);
  rope_store(
      {&batch, kv, kHeads, kHeadDim, RopeStyle::kNeox, nullptr, nullptr, 0.0f, kLayer, qkv.data()},
      0, 1);
  std::vector<float> keys(kBlockTokens * kHeadDim), values(keys.size());
  for (int row = 0; row < kRows; ++row) {
    const std::size_t tile_at =
        static_cast<std::size_t>(table[(kFirst + row) / kBlockTokens]) * tiles.size() / 4;
    read_tile(TileFormat::kQ8Keys, tiles.data() + tile_at, kHeadDim, keys.data());
    read_tile(TileFormat::kQ8_0, tiles.data() + tiles.size() / 2 + tile_at, kHeadDim,
              values.data());
    for (int d = 0; d < kHeadDim; ++d) {
      const float* from = qkv.data() + row * 4 * kHeadDim + d;
      const auto at = static_cast<std::size_t>((kFirst + row) % kBlockTokens * kHeadDim + d);
      // Half a step of the largest of 32, at most 4 / 127 here.
      CHECK(std::fabs(keys[at] - from[2 * kHeadDim]) < 0.016f);
      CHECK(std::fabs(values[at] - from[3 * kHeadDim]) < 0.016f);
    }
  }
  for (std::size_t i = 0; i < queries.size(); ++i) {
    const std::size_t n_row = kHeads * kHeadDim;
    const std::size_t place = i / n_row;
    if (place < kWindowRows) {
      CHECK(queries[i] == 0x7fff);  // of another layer
      continue;
    }
    // The last even positions: 66 (place 1, as 33 is odd) and 68 (place 0).
    const std::size_t row = place == kWindowRows ? 68 - kFirst : 66 - kFirst;
    CHECK(queries[i] == ggml_fp32_to_fp16(qkv[row * 4 * kHeadDim + i % n_row]));
  }
}
