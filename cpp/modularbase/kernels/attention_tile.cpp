// Attention of a tile of rows of one sequence: every key and value is converted once and shared by
// all rows and query heads of the group. Vector lanes run along the queries, so softmax needs no
// sums across lanes.
#include <algorithm>
#include <vector>

#include "modularbase/kernels/attention_scratch.h"
#include "modularbase/kernels/attention_types.h"

namespace modularbase::kernels {
namespace {

constexpr int kVecs = 3;
constexpr int kStrip = kVecs * simd::kLanes;  // queries computed together
constexpr int kRows = 8;                      // kRows x kVecs sums fit the registers
constexpr float kMasked = -1e30f;  // far below any score, finite so that differences are too

/// A thread's room for one tile; queries are counted row by row, heads of the group inside a row.
struct TileRoom {
  std::vector<float> keys;     // [head_dim, kBlockTokens]
  std::vector<float> values;   // [head_dim, kBlockTokens]
  std::vector<float> queries;  // [n_queries, head_dim], scaled
  std::vector<float> weights;  // [kStrip, kBlockTokens]
  std::vector<float> o;        // [n_queries, head_dim]
  std::vector<float> max;      // [n_queries]
  std::vector<float> sum;      // [n_queries]
  std::vector<int> position;   // [n_queries]

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

  template <class Cache>
  void attend() {
    load_queries();
    const int end = span_.pos0 + first_row_ + n_rows_;  // positions any row of the tile sees
    for (int first = 0; first < end; first += kBlockTokens) {
      const int n_tokens = std::min(kBlockTokens, end - first);
      const std::int32_t block = span_.block_table[first / kBlockTokens];
      const KvTierLayer& tier = args_.kv.tiers[kExactTier];
      convert<Cache>(key_tile(args_.kv, tier, block, kv_head_), n_tokens, room_.keys);
      convert<Cache>(value_tile(args_.kv, tier, block, kv_head_), n_tokens, room_.values);
      for (std::int64_t strip = 0; strip < n_queries_; strip += kStrip) attend_strip(strip, first);
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

  // Tokens past the end become zeros: whatever lies in the cache there must not meet a weight.
  template <class Cache>
  void convert(const std::byte* tile, int n_tokens, std::vector<float>& to) {
    const auto* from = reinterpret_cast<const std::uint16_t*>(tile);
    for (std::int64_t i = 0; i < n_tokens * head_dim_; i += simd::kLanes) {
      simd::store(to.data() + i, Cache::load(from + i));
    }
    std::fill(to.begin() + n_tokens * head_dim_, to.begin() + kBlockTokens * head_dim_, 0.0f);
  }

  void attend_strip(std::int64_t strip, int first) {
    const int last_position = room_.position[static_cast<std::size_t>(strip + kStrip - 1)];
    const int n_visible = std::min(kBlockTokens, last_position - first + 1);
    if (n_visible <= 0) return;
    const int n_tokens = (n_visible + kRows - 1) / kRows * kRows;
    float* weights = room_.weights.data();
    for (int token = 0; token < n_tokens; token += kRows) {
      strip_product<false>(room_.keys.data() + token * head_dim_, head_dim_, 1,
                           room_.queries.data() + strip, n_queries_, weights + token * kStrip,
                           kStrip, static_cast<int>(head_dim_));
    }
    const int first_position = room_.position[static_cast<std::size_t>(strip)];
    if (first + n_tokens - 1 > first_position) mask(strip, first, n_tokens);
    softmax(strip, n_tokens);
    for (std::int64_t d = 0; d < head_dim_; d += kRows) {
      strip_product<true>(room_.values.data() + d, 1, head_dim_, weights, kStrip,
                          room_.o.data() + d * n_queries_ + strip, n_queries_, n_tokens);
    }
  }

  void mask(std::int64_t strip, int first, int n_tokens) {
    for (int query = 0; query < kStrip; ++query) {
      const int position = room_.position[static_cast<std::size_t>(strip + query)];
      for (int token = std::max(0, position - first + 1); token < n_tokens; ++token) {
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
      for (std::int64_t g = 0; g < group_; ++g) {
        const std::int64_t query = row * group_ + g;
        const float scale = 1.0f / room_.sum[static_cast<std::size_t>(query)];
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
};

}  // namespace

void attend_tile(const AttentionArgs& args, const AttentionItem& item) {
  thread_local TileRoom room;
  Tile tile(args, item, room);
  if (args.kv.tiers[kExactTier].k_format == TileFormat::kBF16) {
    tile.attend<BF16Cache>();
  } else {
    tile.attend<F16Cache>();
  }
}

}  // namespace modularbase::kernels
