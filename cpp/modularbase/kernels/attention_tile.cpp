// Attention of a tile of rows of one sequence: every key and value is converted once and shared by
// all rows and query heads of the group. Vector lanes run along the queries, so softmax needs no
// sums across lanes.
#include <algorithm>
#include <bit>
#include <cmath>
#include <vector>

#include "modularbase/kernels/attention_rows.h"
#include "modularbase/kernels/attention_scratch.h"
#include "modularbase/kernels/hadamard.h"

namespace modularbase::kernels {
namespace {

constexpr int kVecs = 3;
constexpr int kStrip = kVecs * simd::kLanes;  // queries computed together
constexpr int kRows = 8;                      // kRows x kVecs sums fit the registers
constexpr int kBeforeAll = -(1 << 30);        // a position that every row is behind
constexpr float kMasked = -1e30f;  // far below any score, finite so that differences are too

/// A thread's room for one tile; queries are counted row by row, heads of the group inside a row.
struct TileRoom {
  std::vector<float> keys;         // [head_dim, kBlockTokens]
  std::vector<float> values;       // [head_dim, kBlockTokens]
  std::vector<float> queries;      // [n_queries, head_dim], scaled
  std::vector<float> weights;      // [kStrip, kBlockTokens]
  std::vector<float> o;            // [n_queries, head_dim]
  std::vector<float> log_weights;  // [n_tokens], or none
  std::vector<float> max;          // [n_queries]
  std::vector<float> sum;          // [n_queries]
  std::vector<int> position;       // [n_queries]

  void resize(std::size_t n_queries, std::size_t head_dim) {
    const auto grow = [](auto& v, std::size_t n) {
      if (v.size() < n) v.resize(n);
    };
    grow(keys, head_dim * kBlockTokens);
    grow(values, head_dim * kBlockTokens);
    grow(queries, n_queries * head_dim);
    grow(weights, static_cast<std::size_t>(kStrip) * kBlockTokens);
    grow(o, n_queries * head_dim);
    grow(max, n_queries);
    grow(sum, n_queries);
    grow(position, n_queries);
  }
};

// c[r][*] (+)= sum_k a[r][k] b[k][*] for kRows rows and one strip of columns.
template <bool kAccumulate>
void strip_product(const float* a, std::int64_t row_stride, std::int64_t k_stride, const float* b,
                   std::int64_t b_stride, float* c, std::int64_t c_stride, int n_k) {
  simd::Vec sums[kRows][kVecs];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVecs; ++v) {
      sums[r][v] = kAccumulate ? simd::load(c + r * c_stride + v * simd::kLanes) : simd::zero();
    }
  }
  for (int k = 0; k < n_k; ++k) {
    simd::Vec columns[kVecs];
    for (int v = 0; v < kVecs; ++v) columns[v] = simd::load(b + k * b_stride + v * simd::kLanes);
    for (int r = 0; r < kRows; ++r) {
      const simd::Vec factor = simd::set1(a[r * row_stride + k * k_stride]);
      for (int v = 0; v < kVecs; ++v) sums[r][v] = simd::fma(factor, columns[v], sums[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVecs; ++v) simd::store(c + r * c_stride + v * simd::kLanes, sums[r][v]);
  }
}

/// One tile: some rows of a span, one kv head.
class Tile {
 public:
  Tile(const AttentionArgs& args, const AttentionItem& item, TileRoom& room)
      : args_(args),
        span_(args.batch->spans[item.span]),
        room_(room),
        kv_head_(item.kv_head),
        first_row_(item.first),
        n_rows_(std::min(kTileRows, span_.n_rows - item.first)),
        group_(args.n_head / args.kv.n_head_kv),
        head_dim_(args.kv.head_dim),
        n_queries_((n_rows_ * group_ + kStrip - 1) / kStrip * kStrip) {
    room_.resize(static_cast<std::size_t>(n_queries_), static_cast<std::size_t>(head_dim_));
  }

  void attend() {
    load_queries();
    for (int i = 0; i < span_.n_segments; ++i) {
      const KvSegment& segment = span_.segments[i];
      if (segment.visible == 0 || !args_.kv.tiers[segment.tier].has(kv_head_)) continue;
      load_page(page_of(args_.kv, segment.tier, segment.block, kv_head_, segment.visible));
      attend_page(kBeforeAll);
    }
    const int end = span_.pos0 + first_row_ + n_rows_;  // positions any row of the tile sees
    for (int at = span_.first; at < end; at = (at / kBlockTokens + 1) * kBlockTokens) {
      const int in_block = at % kBlockTokens;
      const std::uint64_t visible =
          token_bits(in_block, std::min(kBlockTokens, in_block + end - at));
      const std::int32_t block = span_.block_table[at / kBlockTokens];
      load_page(page_of(args_.kv, kExactTier, block, kv_head_, visible));
      load_own_rows(at);
      attend_page(at);
    }
    store_outputs();
  }

 private:
  const float* query_source(int row, std::int64_t g) const {
    return args_.qkv + (span_.row0 + first_row_ + row) * args_.qkv_stride +
           (kv_head_ * group_ + g) * head_dim_;
  }

  void load_queries() {
    std::fill_n(room_.queries.begin(), n_queries_ * head_dim_, 0.0f);
    std::fill_n(room_.o.begin(), n_queries_ * head_dim_, 0.0f);
    std::fill_n(room_.max.begin(), n_queries_, kMasked);
    std::fill_n(room_.sum.begin(), n_queries_, 0.0f);
    // Padding queries repeat the last row's position; nobody reads what they gather.
    std::fill_n(room_.position.begin(), n_queries_, span_.pos0 + first_row_ + n_rows_ - 1);
    for (int row = 0; row < n_rows_; ++row) {
      for (std::int64_t g = 0; g < group_; ++g) {
        const std::int64_t query = row * group_ + g;
        room_.position[static_cast<std::size_t>(query)] = span_.pos0 + first_row_ + row;
        const float* source = query_source(row, g);
        for (std::int64_t d = 0; d < head_dim_; ++d) {
          room_.queries[static_cast<std::size_t>(d * n_queries_ + query)] = source[d] * args_.scale;
        }
      }
    }
  }

  void load_page(const Page& page) {
    n_tokens_ = std::popcount(page.visible);
    load_rows(page.tier->k_format, page.k, page.visible, room_.keys.data());
    load_rows(page.tier->v_format, page.v, page.visible, room_.values.data());
    room_.log_weights.clear();
    if (!page.log_weight) return;
    for_each_visible(page.visible,
                     [&](int token) { room_.log_weights.push_back(page.log_weight[token]); });
  }

  // Where the cache rounds to 8 bits, the span's own tokens are taken as they were before: what a
  // prompt's tokens mix at this layer goes into all that the layers above keep of them. The loaded
  // tokens have positions from first on.
  void load_own_rows(int first) {
    if (args_.kv.tiers[kExactTier].k_format != TileFormat::kQ8Keys) return;
    const std::int64_t n_head_kv = args_.kv.n_head_kv;
    for (int token = std::max(0, span_.pos0 - first); token < n_tokens_; ++token) {
      const std::int64_t row = span_.row0 + first + token - span_.pos0;
      const float* key =
          args_.qkv + row * args_.qkv_stride + (n_head_kv * group_ + kv_head_) * head_dim_;
      std::copy_n(key, head_dim_, room_.keys.data() + token * head_dim_);
      std::copy_n(key + n_head_kv * head_dim_, head_dim_, room_.values.data() + token * head_dim_);
    }
  }

  // Visible tokens move up and the rest becomes zeros: whatever else lies in the cache must not
  // meet a weight.
  void load_rows(TileFormat format, const std::byte* tile, std::uint64_t visible, float* rows) {
    switch (format) {
      case TileFormat::kF16:
        convert<F16Rows>(tile, visible, rows);
        break;
      case TileFormat::kBF16:
        convert<BF16Rows>(tile, visible, rows);
        break;
      case TileFormat::kQ8_0:
        convert<Q8_0Rows>(tile, visible, rows);
        break;
      case TileFormat::kQ8Keys:
        convert<Q8_0Rows>(tile, visible, rows);
        hadamard_rotate_rows(rows, n_tokens_, head_dim_);
        break;
      default:
        read_tile(format, tile, head_dim_, rows);
        float* to = rows;
        for_each_visible(visible, [&](int token) {
          std::copy_n(rows + token * head_dim_, head_dim_, to);
          to += head_dim_;
        });
    }
    std::fill(rows + n_tokens_ * head_dim_, rows + kBlockTokens * head_dim_, 0.0f);
  }

  template <class Rows>
  void convert(const std::byte* tile, std::uint64_t visible, float* to) {
    for_each_visible(visible, [&](int token) {
      const std::byte* row = tile + token * Rows::row_bytes(head_dim_);
      for (std::int64_t d = 0; d < head_dim_; d += simd::kLanes) {
        simd::store(to + d, Rows::load(row, d));
      }
      to += head_dim_;
    });
  }

  // The loaded tokens have positions from first on.
  void attend_page(int first) {
    for (std::int64_t strip = 0; strip < n_queries_; strip += kStrip) attend_strip(strip, first);
  }

  void attend_strip(std::int64_t strip, int first) {
    const int last_position = room_.position[static_cast<std::size_t>(strip + kStrip - 1)];
    const int n_visible = std::min(n_tokens_, last_position - first + 1);
    if (n_visible <= 0) return;
    const int n_padded = (n_visible + kRows - 1) / kRows * kRows;
    float* weights = room_.weights.data();
    for (int token = 0; token < n_padded; token += kRows) {
      strip_product<false>(room_.keys.data() + token * head_dim_, head_dim_, 1,
                           room_.queries.data() + strip, n_queries_, weights + token * kStrip,
                           kStrip, static_cast<int>(head_dim_));
    }
    if (!room_.log_weights.empty()) add_log_weights(n_visible);
    const int first_position = room_.position[static_cast<std::size_t>(strip)];
    if (n_padded > std::min(n_tokens_, first_position - first + 1)) mask(strip, first, n_padded);
    softmax(strip, n_padded);
    for (std::int64_t d = 0; d < head_dim_; d += kRows) {
      strip_product<true>(room_.values.data() + d, 1, head_dim_, weights, kStrip,
                          room_.o.data() + d * n_queries_ + strip, n_queries_, n_padded);
    }
  }

  void add_log_weights(int n_tokens) {
    for (int i = 0; i < n_tokens * kStrip; i += simd::kLanes) {
      const auto token = static_cast<std::size_t>(i / kStrip);
      float* scores = room_.weights.data() + i;
      simd::store(scores, simd::load(scores) + simd::set1(room_.log_weights[token]));
    }
  }

  void mask(std::int64_t strip, int first, int n_padded) {
    for (int query = 0; query < kStrip; ++query) {
      const int position = room_.position[static_cast<std::size_t>(strip + query)];
      for (int token = std::clamp(position - first + 1, 0, n_tokens_); token < n_padded; ++token) {
        room_.weights[static_cast<std::size_t>(token) * kStrip + static_cast<std::size_t>(query)] =
            kMasked;
      }
    }
  }

  void softmax(std::int64_t strip, int n_tokens) {
    for (int v = 0; v < kVecs; ++v) {
      float* scores = room_.weights.data() + v * simd::kLanes;
      float* max = room_.max.data() + strip + v * simd::kLanes;
      float* sum = room_.sum.data() + strip + v * simd::kLanes;
      const simd::Vec old_max = simd::load(max);
      simd::Vec new_max = old_max;
      for (int t = 0; t < n_tokens; ++t)
        new_max = simd::max(new_max, simd::load(scores + t * kStrip));
      const simd::Vec shrink = simd::exp(old_max - new_max);
      simd::Vec total = simd::load(sum) * shrink;
      for (int t = 0; t < n_tokens; ++t) {
        const simd::Vec weight = simd::exp(simd::load(scores + t * kStrip) - new_max);
        simd::store(scores + t * kStrip, weight);
        total = total + weight;
      }
      simd::store(max, new_max);
      simd::store(sum, total);
      float* o = room_.o.data() + strip + v * simd::kLanes;
      for (std::int64_t d = 0; d < head_dim_; ++d) {
        simd::store(o + d * n_queries_, simd::load(o + d * n_queries_) * shrink);
      }
    }
  }

  void store_outputs() {
    for (int row = 0; row < n_rows_; ++row) {
      const std::int64_t wanted = window_row(span_, args_.layer, first_row_ + row);
      for (std::int64_t g = 0; g < group_; ++g) {
        const std::int64_t query = row * group_ + g;
        const float sum = room_.sum[static_cast<std::size_t>(query)];
        if (wanted >= 0) {
          span_.window->log_mass[wanted * args_.n_head + kv_head_ * group_ + g] =
              room_.max[static_cast<std::size_t>(query)] + std::log(sum);
        }
        const float scale = 1.0f / sum;
        float* out = args_.out + (span_.row0 + first_row_ + row) * args_.n_head * head_dim_ +
                     (kv_head_ * group_ + g) * head_dim_;
        for (std::int64_t d = 0; d < head_dim_; ++d) {
          out[d] = room_.o[static_cast<std::size_t>(d * n_queries_ + query)] * scale;
        }
      }
    }
  }

  const AttentionArgs& args_;
  const AttentionSpan& span_;
  TileRoom& room_;
  const std::int64_t kv_head_;
  const int first_row_;
  const int n_rows_;
  const std::int64_t group_;
  const std::int64_t head_dim_;
  const std::int64_t n_queries_;  // padded to whole strips
  int n_tokens_ = 0;              // of the loaded page
};

}  // namespace

void attend_tile(const AttentionArgs& args, const AttentionItem& item) {
  thread_local TileRoom room;
  Tile(args, item, room).attend();
}

}  // namespace modularbase::kernels
