// Attention of the few rows of a short span over one part of its positions: reads each key and
// value once for all query heads of the group.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "modularbase/kernels/attention_scratch.h"
#include "modularbase/kernels/attention_types.h"

namespace modularbase::kernels {
namespace {

constexpr int kMaxGroup = 4;  // query heads per pass: their sums fit the registers
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

/// What one query head has gathered: out = o / sum.
struct Gathered {
  float* max;  // [1]
  float* sum;  // [1]
  float* o;    // [head_dim]
};

// Fetches part of a tile that is read next, while this one is computed: the memory never rests.
inline void prefetch_lines(const std::uint16_t* tile, std::int64_t first, std::int64_t n_elements) {
  constexpr std::int64_t kLine = 32;  // elements
  for (std::int64_t i = 0; i < n_elements; i += kLine) __builtin_prefetch(tile + first + i);
}

// scores[g][j] = q_g . k_j for 64 tokens (all of them: a partly filled block holds old numbers,
// ignored later).
template <class Cache, int G>
void block_scores(const float* q, std::int64_t head_dim, const std::uint16_t* k, int n_tokens,
                  const std::uint16_t* ahead, float (*scores)[kBlockTokens]) {
  for (int j = 0; j < n_tokens; j += 4) {
    prefetch_lines(ahead, j * head_dim, 4 * head_dim);
    simd::Vec sums[4][G];
    for (auto& row : sums) {
      for (simd::Vec& sum : row) sum = simd::zero();
    }
    const std::uint16_t* key = k + j * head_dim;
    for (std::int64_t d = 0; d < head_dim; d += simd::kLanes) {
      simd::Vec query[G];
      for (int g = 0; g < G; ++g) query[g] = simd::load(q + g * head_dim + d);
      for (int t = 0; t < 4; ++t) {
        const simd::Vec value = Cache::load(key + t * head_dim + d);
        for (int g = 0; g < G; ++g) sums[t][g] = simd::fma(query[g], value, sums[t][g]);
      }
    }
    for (int g = 0; g < G; ++g) {
      simd::sum_lanes4(sums[0][g], sums[1][g], sums[2][g], sums[3][g], scores[g] + j);
    }
  }
}

// o_g += sum_j p[g][j] v_j
template <class Cache, int G>
void add_values(const float (*p)[kBlockTokens], int n_tokens, const std::uint16_t* v,
                std::int64_t head_dim, const std::uint16_t* ahead, const Gathered* gathered) {
  constexpr int kVecs = 4;
  const auto run = [&]<int N>(std::int64_t d) {
    simd::Vec o[G][N];
    for (int g = 0; g < G; ++g) {
      for (int i = 0; i < N; ++i) o[g][i] = simd::load(gathered[g].o + d + i * simd::kLanes);
    }
    for (int j = 0; j < n_tokens; ++j) {
      prefetch_lines(ahead, j * head_dim, head_dim);
      simd::Vec value[N];
      for (int i = 0; i < N; ++i) value[i] = Cache::load(v + j * head_dim + d + i * simd::kLanes);
      for (int g = 0; g < G; ++g) {
        const simd::Vec weight = simd::set1(p[g][j]);
        for (int i = 0; i < N; ++i) o[g][i] = simd::fma(weight, value[i], o[g][i]);
      }
    }
    for (int g = 0; g < G; ++g) {
      for (int i = 0; i < N; ++i) simd::store(gathered[g].o + d + i * simd::kLanes, o[g][i]);
    }
  };
  std::int64_t d = 0;
  for (; d + kVecs * simd::kLanes <= head_dim; d += kVecs * simd::kLanes) {
    run.template operator()<kVecs>(d);
  }
  for (; d < head_dim; d += simd::kLanes) run.template operator()<1>(d);
}

// Turns scores into weights relative to the running maximum, rescaling what was gathered before.
void online_softmax(float* scores, int n_visible, int n_padded, std::int64_t head_dim,
                    const Gathered& gathered) {
  std::fill(scores + n_visible, scores + n_padded, kMinusInfinity);
  simd::Vec maxima = simd::load(scores);
  for (int j = simd::kLanes; j < n_padded; j += simd::kLanes) {
    maxima = simd::max(maxima, simd::load(scores + j));
  }
  float lanes[simd::kLanes];
  simd::store(lanes, maxima);
  const float new_max = std::max(*gathered.max, *std::max_element(lanes, lanes + simd::kLanes));
  const float shrink = std::exp(*gathered.max - new_max);  // 0 for the first block: e^-inf
  const simd::Vec shift = simd::set1(-new_max);
  for (int j = 0; j < n_padded; j += simd::kLanes) {
    simd::store(scores + j, simd::exp(simd::load(scores + j) + shift));
  }
  std::fill(scores + n_visible, scores + n_padded, 0.0f);
  simd::Vec sums = simd::zero();
  for (int j = 0; j < n_padded; j += simd::kLanes) sums = sums + simd::load(scores + j);
  simd::store(lanes, sums);
  float sum = 0.0f;
  for (const float lane : lanes) sum += lane;
  *gathered.sum = *gathered.sum * shrink + sum;
  *gathered.max = new_max;
  if (shrink != 1.0f) {
    const simd::Vec factor = simd::set1(shrink);
    for (std::int64_t d = 0; d < head_dim; d += simd::kLanes) {
      simd::store(gathered.o + d, simd::load(gathered.o + d) * factor);
    }
  }
}

template <class Cache, int G>
void attend_heads(const AttentionArgs& args, const AttentionSpan& span, const AttentionItem& item,
                  int row, const float* q, const Gathered* gathered) {
  const KvLayer& kv = args.kv;
  const KvTierLayer& tier = kv.tiers[kExactTier];
  const int position = span.pos0 + row;
  const int end = std::min((item.first + 1) * kPartTokens, position + 1);
  alignas(64) float scores[G][kBlockTokens];
  for (int first = item.first * kPartTokens; first < end; first += kBlockTokens) {
    const std::int32_t block = span.block_table[first / kBlockTokens];
    const int n_visible = std::min(kBlockTokens, end - first);
    const int n_padded = (n_visible + 15) / 16 * 16;
    const auto elements = [](const std::byte* tile) {
      return reinterpret_cast<const std::uint16_t*>(tile);
    };
    const std::uint16_t* k = elements(key_tile(kv, tier, block, item.kv_head));
    const std::uint16_t* v = elements(value_tile(kv, tier, block, item.kv_head));
    const bool is_last = first + kBlockTokens >= end;
    const std::uint16_t* next_k =
        is_last ? k
                : elements(
                      key_tile(kv, tier, span.block_table[first / kBlockTokens + 1], item.kv_head));
    block_scores<Cache, G>(q, kv.head_dim, k, n_padded, v, scores);
    for (int g = 0; g < G; ++g) {
      online_softmax(scores[g], n_visible, n_padded, kv.head_dim, gathered[g]);
    }
    add_values<Cache, G>(scores, n_visible, v, kv.head_dim, next_k, gathered);
  }
}

template <class Cache>
void attend_row(const AttentionArgs& args, const AttentionSpan& span, const AttentionItem& item,
                int row, float* partial) {
  const std::int64_t head_dim = args.kv.head_dim;
  const std::int64_t group = args.n_head / args.kv.n_head_kv;
  alignas(64) float q[kMaxGroup * 256];
  for (std::int64_t g0 = 0; g0 < group; g0 += kMaxGroup) {
    const int n = static_cast<int>(std::min<std::int64_t>(kMaxGroup, group - g0));
    const float* source =
        args.qkv + (span.row0 + row) * args.qkv_stride + (item.kv_head * group + g0) * head_dim;
    for (std::int64_t i = 0; i < n * head_dim; ++i) q[i] = source[i] * args.scale;
    Gathered gathered[kMaxGroup];
    for (int g = 0; g < n; ++g) {
      float* at = partial + (g0 + g) * (head_dim + 2);
      gathered[g] = {at, at + 1, at + 2};
      at[0] = kMinusInfinity;
      std::fill(at + 1, at + 2 + head_dim, 0.0f);
    }
    switch (n) {
      case 1:
        attend_heads<Cache, 1>(args, span, item, row, q, gathered);
        break;
      case 2:
        attend_heads<Cache, 2>(args, span, item, row, q, gathered);
        break;
      case 3:
        attend_heads<Cache, 3>(args, span, item, row, q, gathered);
        break;
      default:
        attend_heads<Cache, 4>(args, span, item, row, q, gathered);
    }
  }
}

// out = sum over parts, in their order, of e^(max_part - max) o_part, over the same sum of sums.
void merge_row(const AttentionArgs& args, const AttentionSpan& span, const AttentionItem& item,
               int row, const float* partials, std::int64_t part_stride, int n_parts) {
  const std::int64_t head_dim = args.kv.head_dim;
  const std::int64_t group = args.n_head / args.kv.n_head_kv;
  for (std::int64_t g = 0; g < group; ++g) {
    const float* first = partials + g * (head_dim + 2);
    float max = kMinusInfinity;
    for (int i = 0; i < n_parts; ++i) max = std::max(max, first[i * part_stride]);
    float sum = 0.0f;
    float* out = args.out + (span.row0 + row) * args.n_head * head_dim +
                 (item.kv_head * group + g) * head_dim;
    std::fill(out, out + head_dim, 0.0f);
    for (int i = 0; i < n_parts; ++i) {
      const float* part = first + i * part_stride;
      const float weight = std::exp(part[0] - max);
      sum += weight * part[1];
      const simd::Vec factor = simd::set1(weight);
      for (std::int64_t d = 0; d < head_dim; d += simd::kLanes) {
        simd::store(out + d, simd::fma(factor, simd::load(part + 2 + d), simd::load(out + d)));
      }
    }
    const simd::Vec factor = simd::set1(1.0f / sum);
    for (std::int64_t d = 0; d < head_dim; d += simd::kLanes) {
      simd::store(out + d, simd::load(out + d) * factor);
    }
  }
}

}  // namespace

void attend_part(const AttentionArgs& args, const AttentionItem& item) {
  const AttentionSpan& span = args.batch->spans[item.span];
  const std::int64_t stride = partial_stride(args.n_head / args.kv.n_head_kv, args.kv.head_dim);
  const std::int64_t part_stride = stride * span.n_rows;
  thread_local std::unique_ptr<float[]> single;  // the only part's result needs no shared place
  thread_local std::int64_t n_single = 0;
  if (item.n_parts == 1 && n_single < part_stride) {
    single = std::make_unique_for_overwrite<float[]>(static_cast<std::size_t>(part_stride));
    n_single = part_stride;
  }
  float* partials = item.n_parts == 1 ? single.get() : args.scratch->partials(item);
  for (int row = 0; row < span.n_rows; ++row) {
    float* partial = partials + (item.n_parts == 1 ? 0 : item.first * part_stride) + row * stride;
    if (args.kv.tiers[kExactTier].k_format == TileFormat::kBF16) {
      attend_row<BF16Cache>(args, span, item, row, partial);
    } else {
      attend_row<F16Cache>(args, span, item, row, partial);
    }
  }
  if (item.n_parts > 1) {
    std::atomic<int>& n_done = args.scratch->n_done(item);
    if (n_done.fetch_add(1, std::memory_order_acq_rel) + 1 < item.n_parts) return;
    n_done.store(0, std::memory_order_relaxed);
  }
  for (int row = 0; row < span.n_rows; ++row) {
    const int n_parts =
        (span.pos0 + row) / kPartTokens + 1;  // later parts hold nothing of this row
    merge_row(args, span, item, row, partials + row * stride, part_stride, n_parts);
  }
}

}  // namespace modularbase::kernels
