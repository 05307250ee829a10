// Attention over segments of all tiers and formats, against its definition in doubles over the
// floats that the tiles stand for.
#include <doctest/doctest.h>
#include <ggml.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "modularbase/kernels/attention.h"
#include "modularbase/kernels/attention_scratch.h"

using namespace modularbase::kernels;

namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Shape {
  std::int64_t n_head, n_head_kv, head_dim;
  TileFormat exact = TileFormat::kF16;
  TileFormat important_keys = TileFormat::kQ4Keys;
};

struct Row {
  int first, pos0, n_rows;
  int n_segments;
};

/// The memory of all tiers, spans over it, and what a reference knows of both.
class Tiers {
 public:
  Tiers(const Shape& shape, const std::vector<Row>& spans, unsigned seed)
      : shape_(shape), random_(seed) {
    kv_ = {.n_head_kv = shape.n_head_kv, .head_dim = shape.head_dim, .tiers = {}};
    const bool has_q8 = shape.exact == TileFormat::kQ8Keys;
    add_tier(kExactTier, shape.exact, has_q8 ? TileFormat::kQ8_0 : shape.exact);
    add_tier(kImportantTier, shape.important_keys, TileFormat::kQ4Values);
    add_tier(kRedundantTier, TileFormat::kQ8Keys, TileFormat::kQ8_0);
    add_tier(kDetailTier, TileFormat::kQ4Keys, TileFormat::kQ4Values);
    for (const Row& row : spans) add_span(row);
    qkv_.resize(static_cast<std::size_t>(n_rows_ * stride()));
    for (float& value : qkv_) value = normal();
  }

  std::int64_t stride() const { return (shape_.n_head + 2 * shape_.n_head_kv) * shape_.head_dim; }
  std::vector<AttentionSpan>& spans() { return spans_; }
  std::vector<KvSegment>& segments(std::size_t span) { return segments_[span]; }
  std::int64_t n_rows() const { return n_rows_; }
  void set_rows(std::int64_t n) { n_rows_ = n; }

  /// What lies in blocks that nobody sees, or in their invisible tokens: NaN where a format has it.
  void poison() {
    for (std::size_t span = 0; span < spans_.size(); ++span) {
      for (const KvSegment& segment : segments_[span]) {
        for (int token = 0; token < kBlockTokens; ++token) {
          if ((segment.visible >> token & 1) == 0) poison_token(segment.tier, segment.block, token);
        }
      }
      const int end = spans_[span].pos0 + spans_[span].n_rows;
      const int n = static_cast<int>(tables_[span].size()) * kBlockTokens;
      for (int position = 0; position < n; ++position) {
        if (position >= spans_[span].first && position < end) continue;
        poison_token(kExactTier, tables_[span][static_cast<std::size_t>(position / kBlockTokens)],
                     position % kBlockTokens);
      }
    }
  }

  std::vector<float> run(int nth, int layer = 0) {
    AttentionBatch batch{spans_.data(), static_cast<int>(spans_.size()), n_rows_, nullptr, nullptr};
    AttentionScratch scratch;
    scratch.plan(batch, shape_.n_head, shape_.n_head_kv, shape_.head_dim);
    std::atomic<int> next{0};
    std::vector<float> out(static_cast<std::size_t>(n_rows_ * shape_.n_head * shape_.head_dim),
                           kNaN);
    const AttentionArgs args{.batch = &batch,
                             .kv = kv_,
                             .layer = layer,
                             .n_head = shape_.n_head,
                             .qkv_stride = stride(),
                             .qkv = qkv_.data(),
                             .scale = 1.0f / std::sqrt(static_cast<float>(shape_.head_dim)),
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

  struct Expected {
    std::vector<float> out;        // [head_dim, n_head, n_rows]
    std::vector<double> log_mass;  // [n_head, n_rows]
  };
  Expected expected() const {
    Expected result;
    for (std::size_t span = 0; span < spans_.size(); ++span) {
      for (int row = 0; row < spans_[span].n_rows; ++row) {
        for (std::int64_t head = 0; head < shape_.n_head; ++head) {
          expect_head(span, row, head, result);
        }
      }
    }
    return result;
  }

 private:
  static constexpr std::int32_t kMaxBlocks = 64;
  using Tile = std::vector<float>;  // [head_dim, kBlockTokens]

  struct Tier {
    std::vector<std::byte> bytes;
    std::vector<Tile> keys, values;   // of (block, head)
    std::vector<float> log_weights;   // [kBlockTokens] of (block, head)
    std::vector<std::int32_t> tiles;  // of each head; -1: it has none
    std::int32_t n_blocks = 0;
  };

  float normal() { return normal_(random_); }
  std::uint64_t any_bits() { return static_cast<std::uint64_t>(random_()) << 32 | random_(); }
  std::size_t tile_at(std::int32_t block, std::int64_t head) const {
    return static_cast<std::size_t>(block * shape_.n_head_kv + head);
  }

  // Of two heads or more the first keeps details, and the others have slots.
  bool has_tile(std::int32_t index, std::int64_t head) const {
    if (index == kDetailTier) return shape_.n_head_kv > 1 && head == 0;
    return index != kRedundantTier || shape_.n_head_kv == 1 || head > 0;
  }

  void add_tier(KvTier index, TileFormat k, TileFormat v) {
    Tier& tier = tiers_[index];
    std::int32_t n_tiles = 0;
    for (std::int64_t head = 0; head < shape_.n_head_kv; ++head) {
      tier.tiles.push_back(has_tile(index, head) ? n_tiles++ : -1);
    }
    if (n_tiles == 0) return;
    const auto n = static_cast<std::size_t>(n_tiles);
    const std::size_t k_bytes = n * tile_bytes(k, shape_.head_dim);
    const std::size_t v_bytes = n * tile_bytes(v, shape_.head_dim);
    const std::size_t log_bytes = index == kRedundantTier ? n * kBlockTokens * sizeof(float) : 0;
    const std::size_t stride = log_bytes + k_bytes + v_bytes;
    tier.bytes.assign(kMaxBlocks * stride, std::byte{0xff});  // NaN in every float format
    kv_.tiers[index] = {.k_format = k,
                        .v_format = v,
                        .k = tier.bytes.data() + log_bytes,
                        .v = tier.bytes.data() + log_bytes + k_bytes,
                        .log_weight = log_bytes > 0 ? tier.bytes.data() : nullptr,
                        .block_stride = stride,
                        .tiles = n_tiles < shape_.n_head_kv ? tier.tiles.data() : nullptr};
  }

  std::byte* tile(std::byte* pool, std::int32_t index, TileFormat format, std::int32_t block,
                  std::int64_t head) const {
    const std::int32_t number = tiers_[index].tiles[static_cast<std::size_t>(head)];
    return pool + static_cast<std::size_t>(block) * kv_.tiers[index].block_stride +
           static_cast<std::size_t>(number) * tile_bytes(format, shape_.head_dim);
  }
  std::byte* log_weights(std::int32_t index, std::int32_t block, std::int64_t head) const {
    const std::int32_t number = tiers_[index].tiles[static_cast<std::size_t>(head)];
    const KvTierLayer& layer = kv_.tiers[index];
    return layer.log_weight + static_cast<std::size_t>(block) * layer.block_stride +
           static_cast<std::size_t>(number) * kBlockTokens * sizeof(float);
  }

  Tile random_tile(TileFormat format, std::byte* to) {
    Tile rows(static_cast<std::size_t>(kBlockTokens * shape_.head_dim));
    for (float& value : rows) value = normal();
    write_tile(format, rows.data(), shape_.head_dim, to);
    read_tile(format, to, shape_.head_dim, rows.data());
    return rows;
  }

  std::int32_t new_block(std::int32_t index) {
    Tier& tier = tiers_[index];
    const KvTierLayer& layer = kv_.tiers[index];
    const std::int32_t block = tier.n_blocks++;
    REQUIRE(block < kMaxBlocks);
    for (std::int64_t head = 0; head < shape_.n_head_kv; ++head) {
      tier.log_weights.resize(tier.log_weights.size() + kBlockTokens);
      if (!has_tile(index, head)) {
        tier.keys.emplace_back();
        tier.values.emplace_back();
        continue;
      }
      tier.keys.push_back(
          random_tile(layer.k_format, tile(layer.k, index, layer.k_format, block, head)));
      tier.values.push_back(
          random_tile(layer.v_format, tile(layer.v, index, layer.v_format, block, head)));
      if (!layer.log_weight) continue;
      float* own = tier.log_weights.data() + tile_at(block, head) * kBlockTokens;
      for (int slot = 0; slot < kBlockTokens; ++slot) own[slot] = 2 * normal();
      std::memcpy(log_weights(index, block, head), own, kBlockTokens * sizeof(float));
    }
    return block;
  }

  std::uint64_t random_mask() {
    switch (random_() % 5) {
      case 0:
        return 0;
      case 1:
        return ~std::uint64_t{0};
      case 2:
        return (std::uint64_t{1} << random_() % 64) - 1;
      case 3:
        return std::uint64_t{1} << random_() % 64;
      default:
        return any_bits();
    }
  }

  void add_span(const Row& row) {
    std::vector<std::int32_t>& table = tables_.emplace_back();
    for (int at = 0; at < row.pos0 + row.n_rows; at += kBlockTokens) {
      const bool is_used = at + kBlockTokens > row.first;
      table.push_back(is_used ? new_block(kExactTier) : -1);
    }
    std::vector<KvSegment>& segments = segments_.emplace_back();
    for (int i = 0; i < row.n_segments; ++i) {
      const auto tier = static_cast<std::int32_t>(random_() % kNKvTiers);
      // Such a segment shows a layer without details nothing.
      segments.push_back({random_mask(), tier, kv_.tiers[tier].k ? new_block(tier) : 0});
    }
    spans_.push_back({.row0 = static_cast<std::int32_t>(n_rows_),
                      .n_rows = row.n_rows,
                      .pos0 = row.pos0,
                      .block_table = table.data(),
                      .first = row.first,
                      .segments = segments.empty() ? nullptr : segments.data(),
                      .n_segments = row.n_segments});
    n_rows_ += row.n_rows;
  }

  void poison_token(std::int32_t index, std::int32_t block, int token) {
    const KvTierLayer& layer = kv_.tiers[index];
    if (block < 0 || !layer.k) return;
    for (std::int64_t head = 0; head < shape_.n_head_kv; ++head) {
      if (!has_tile(index, head)) continue;
      for (const auto& [pool, format] :
           {std::pair{layer.k, layer.k_format}, std::pair{layer.v, layer.v_format}}) {
        std::byte* at = tile(pool, index, format, block, head);
        const std::size_t row_bytes = tile_bytes(format, shape_.head_dim) / kBlockTokens;
        if (format == TileFormat::kQ4Keys || format == TileFormat::kQ4Values) {
          auto* scales = reinterpret_cast<std::uint16_t*>(
              at + (format == TileFormat::kQ4Keys ? 2 * shape_.head_dim : 0));
          for (std::int64_t group = 0; group < shape_.head_dim / 32; ++group) {
            scales[group * kBlockTokens + token] = 0x7fff;
          }
        } else {
          std::memset(at + static_cast<std::size_t>(token) * row_bytes, 0xff, row_bytes);
        }
      }
      if (layer.log_weight) {
        std::memset(log_weights(index, block, head) + static_cast<std::size_t>(token) * 4, 0xff, 4);
      }
    }
  }

  void expect_head(std::size_t span_index, int row, std::int64_t head, Expected& result) const {
    const AttentionSpan& span = spans_[span_index];
    const std::int64_t kv_head = head / (shape_.n_head / shape_.n_head_kv);
    const float* q = qkv_.data() + (span.row0 + row) * stride() + head * shape_.head_dim;
    std::vector<double> scores;
    std::vector<const float*> values;
    const auto add = [&](const float* key, const float* value, double log_weight) {
      double score = 0.0;
      for (std::int64_t d = 0; d < shape_.head_dim; ++d) {
        score += static_cast<double>(q[d]) * key[d];
      }
      scores.push_back(score / std::sqrt(static_cast<double>(shape_.head_dim)) + log_weight);
      values.push_back(value);
    };
    const auto see = [&](std::int32_t index, std::int32_t block, int token) {
      const Tier& tier = tiers_[index];
      const std::size_t at = tile_at(block, kv_head);
      const auto offset = static_cast<std::ptrdiff_t>(token * shape_.head_dim);
      const double log_weight =
          index == kRedundantTier
              ? tier.log_weights[at * kBlockTokens + static_cast<std::size_t>(token)]
              : 0.0;
      add(tier.keys[at].data() + offset, tier.values[at].data() + offset, log_weight);
    };
    const bool is_own_exact = shape_.exact == TileFormat::kQ8Keys && span.n_rows >= kTileSpanRows;
    const auto see_own = [&](int own_row) {
      const float* key = qkv_.data() + (span.row0 + own_row) * stride() +
                         (shape_.n_head + kv_head) * shape_.head_dim;
      add(key, key + shape_.n_head_kv * shape_.head_dim, 0.0);
    };
    for (const KvSegment& segment : segments_[span_index]) {
      if (!has_tile(segment.tier, kv_head)) continue;
      for (int token = 0; token < kBlockTokens; ++token) {
        if ((segment.visible >> token & 1) != 0) see(segment.tier, segment.block, token);
      }
    }
    for (int position = span.first; position <= span.pos0 + row; ++position) {
      if (is_own_exact && position >= span.pos0) {
        see_own(position - span.pos0);
      } else {
        see(kExactTier, span.block_table[position / kBlockTokens], position % kBlockTokens);
      }
    }
    const double largest = *std::max_element(scores.begin(), scores.end());
    double sum = 0.0;
    std::vector<double> out(static_cast<std::size_t>(shape_.head_dim));
    for (std::size_t i = 0; i < scores.size(); ++i) {
      const double weight = std::exp(scores[i] - largest);
      sum += weight;
      for (std::size_t d = 0; d < out.size(); ++d) out[d] += weight * values[i][d];
    }
    for (const double value : out) result.out.push_back(static_cast<float>(value / sum));
    result.log_mass.push_back(largest + std::log(sum));
  }

  Shape shape_;
  std::mt19937 random_;
  std::normal_distribution<float> normal_;
  KvLayer kv_{};
  Tier tiers_[kNKvTiers];
  std::vector<AttentionSpan> spans_;
  std::vector<std::vector<std::int32_t>> tables_;
  std::vector<std::vector<KvSegment>> segments_;
  std::vector<float> qkv_;
  std::int64_t n_rows_ = 0;
};

// Queries and weights keep 16 bits of the largest in a group: below 1e-4 of values near 1; F32 sums
// over a few hundred of them add as much.
constexpr double kTolerance = 3e-4;

template <class T>
double worst(const std::vector<float>& found, const std::vector<T>& expected) {
  REQUIRE(found.size() == expected.size());
  double result = 0.0;
  for (std::size_t i = 0; i < found.size(); ++i) {
    if (!std::isfinite(found[i])) return INFINITY;
    result = std::max(result, std::fabs(static_cast<double>(found[i]) - expected[i]));
  }
  return result;
}

// Decoding, a few rows, tiles; first at a block's edge and inside one; no segments; the exact rows
// are the span's own alone.
const std::vector<Row> kMixed = {{0, 70, 1, 3},    {128, 200, 1, 9}, {150, 150, 1, 5},
                                 {77, 100, 3, 6},  {0, 0, 2, 4},     {0, 0, 20, 4},
                                 {0, 130, 1, 0},   {65, 70, 70, 7},  {300, 310, 7, 13},
                                 {100, 100, 9, 2}, {0, 90, 12, 0}};

}  // namespace

TEST_CASE("attention over segments equals its definition, whatever lies in unused memory") {
  unsigned seed = 1;
  for (const std::int64_t head_dim : {32, 64, 96, 128}) {
    for (std::int64_t group = 1; group <= 8; ++group) {
      const bool has_q8 = group % 3 == 0;
      const Shape shape{2 * group, 2, head_dim,
                        has_q8           ? TileFormat::kQ8Keys
                        : group % 3 == 1 ? TileFormat::kF16
                                         : TileFormat::kBF16,
                        group % 4 == 0 ? TileFormat::kQ8Keys : TileFormat::kQ4Keys};
      CAPTURE(head_dim);
      CAPTURE(group);
      Tiers tiers(shape, kMixed, ++seed);
      const Tiers::Expected expected = tiers.expected();
      tiers.poison();
      CHECK(worst(tiers.run(1 + static_cast<int>(seed % 4)), expected.out) < kTolerance);
    }
  }
}

TEST_CASE("a row over segments gives the same bits alone, in a batch, and with more threads") {
  const std::vector<Row> rows = {{128, 300, 1, 11}, {0, 40, 20, 3}, {64, 90, 3, 6}};
  Tiers tiers({9, 3, 64}, rows, 77);
  const std::vector<float> batch = tiers.run(1);
  for (int nth = 2; nth <= 4; ++nth) CHECK(tiers.run(nth) == batch);
  tiers.spans().resize(1);
  tiers.set_rows(1);
  const std::vector<float> alone = tiers.run(2);
  CHECK(std::equal(alone.begin(), alone.end(), batch.begin()));
}

TEST_CASE("a segment that shows nothing changes nothing") {
  Tiers tiers({6, 2, 64}, {{64, 100, 1, 4}, {64, 100, 16, 4}}, 5);
  for (std::size_t span = 0; span < 2; ++span) {
    for (KvSegment& segment : tiers.segments(span)) segment.visible = 0;
  }
  const std::vector<float> hidden = tiers.run(2);
  for (AttentionSpan& span : tiers.spans()) span.n_segments = 0;
  CHECK(tiers.run(2) == hidden);
}

TEST_CASE("scores far apart between segments neither overflow nor become NaN") {
  Tiers tiers({4, 1, 64}, {{0, 10, 1, 12}, {0, 10, 9, 12}}, 8);
  const Tiers::Expected expected = tiers.expected();
  CHECK(worst(tiers.run(2), expected.out) < kTolerance);
}

TEST_CASE(
    "the window gets the log of each row's mass where its stride says, the last rows' at the end") {
  constexpr std::int64_t kHeads = 6, kLayers = 3;
  for (const int stride : {1, 4}) {
    const std::vector<Row> rows = {{64, 99, 3, 5}, {0, 30, 100, 2}, {0, 8, 1, 0}};
    Tiers tiers({kHeads, 2, 64}, rows, 21);
    std::vector<std::vector<float>> log_mass;
    std::vector<QueryWindow> windows;
    constexpr std::int32_t kRows = 8;
    for (std::size_t i = 0; i < rows.size(); ++i) {
      log_mass.emplace_back(static_cast<std::size_t>(kHeads * kRows * kLayers), kNaN);
      windows.push_back({nullptr, log_mass.back().data(), kRows, stride});
    }
    for (std::size_t i = 0; i < rows.size(); ++i) tiers.spans()[i].window = &windows[i];
    const Tiers::Expected expected = tiers.expected();
    tiers.run(2, 1);
    std::size_t at = 0;
    for (std::size_t span = 0; span < rows.size(); ++span) {
      std::vector<float> wanted(log_mass[span].size(), kNaN);
      for (int row = 0; row < rows[span].n_rows; ++row) {
        const int position = rows[span].pos0 + row;
        for (std::int64_t head = 0; head < kHeads; ++head, ++at) {
          if (position % stride != 0) continue;
          const std::int64_t place = (kRows + position / stride % kRows) * kHeads + head;
          wanted[static_cast<std::size_t>(place)] = static_cast<float>(expected.log_mass[at]);
        }
      }
      for (std::size_t i = 0; i < wanted.size(); ++i) {
        CAPTURE(i);
        const float found = log_mass[span][i];
        if (std::isnan(wanted[i])) {
          CHECK(std::isnan(found));
        } else {
          CHECK(std::fabs(found - wanted[i]) < kTolerance);
        }
      }
    }
  }
}
