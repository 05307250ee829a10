// Attention of the few rows of a short span over one part of what they see: reads each key and
// value once for all query heads of the group.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <memory>
#include <span>

#include "modularbase/kernels/attention_pages.h"
#include "modularbase/kernels/attention_q4.h"
#include "modularbase/kernels/attention_q8.h"
#include "modularbase/kernels/attention_rows.h"
#include "modularbase/kernels/attention_scratch.h"
#include "modularbase/kernels/rounded_values.h"
#include "modularbase/kernels/tiles_ahead.h"

namespace modularbase::kernels {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

/// The query heads of one pass and what each has gathered: out = (o + H rotated) / sum.
template <int G>
struct Pass {
  RoundedQueries<G> rounded;
  const float* q;  // [head_dim, G], scaled
  float* max[G];
  float* sum[G];
  float* o[G];        // [head_dim]
  float* rotated[G];  // [head_dim], where values are rotated; else null
};

// Calls f with each vector's place among the scores of some pages, and the bits of its lanes.
template <class F>
void for_each_vector(std::span<const Page> pages, const F& f) {
  for (std::size_t i = 0; i < pages.size(); ++i) {
    const std::uint64_t visible = pages[i].visible;
    const int n_padded = (std::bit_width(visible) + 15) / 16 * 16;
    for (int j = 0; j < n_padded; j += simd::kLanes) f(i * kBlockTokens + j, visible >> j);
  }
}

// Turns scores into weights relative to their maximum.
template <int G>
void softmax(float* scores, std::span<const Page> pages, Pass<G>& pass) {
  const simd::Vec none = simd::set1(kMinusInfinity);
  simd::Vec maxima[G];
  for (simd::Vec& v : maxima) v = none;
  for_each_vector(pages, [&](std::size_t at, std::uint64_t visible) {
    for (int g = 0; g < G; ++g) {
      const simd::Vec score = simd::load(scores + g * kScoreStride + at);
      maxima[g] = simd::max(maxima[g], simd::select(visible, score, none));
    }
  });
  simd::Vec shift[G];
  for (int g = 0; g < G; ++g) {
    *pass.max[g] = simd::max_lanes(maxima[g]);
    shift[g] = simd::set1(-*pass.max[g]);
  }
  simd::Vec sums[kMaxGroup] = {simd::zero(), simd::zero(), simd::zero(), simd::zero()};
  for_each_vector(pages, [&](std::size_t at, std::uint64_t visible) {
    for (int g = 0; g < G; ++g) {
      float* score = scores + g * kScoreStride + at;
      const simd::Vec weight = simd::exp_below_88(simd::load(score) + shift[g]);
      const simd::Vec masked = simd::select(visible, weight, simd::zero());
      simd::store(score, masked);
      sums[g] = sums[g] + masked;
    }
  });
  float sum[kMaxGroup];
  simd::sum_lanes4(sums[0], sums[1], sums[2], sums[3], sum);
  for (int g = 0; g < G; ++g) *pass.sum[g] = sum[g];
}

template <int G>
void page_scores(const Pass<G>& pass, std::int64_t head_dim, const Page& page, TilesAhead& ahead,
                 float* scores) {
  switch (page.tier->k_format) {
    case TileFormat::kQ4Keys:
      q4_scores<G>(pass.q, pass.rounded, head_dim, page, ahead, scores);
      break;
    case TileFormat::kQ8Keys:
      q8_scores<G>(pass.rounded, head_dim, page, ahead, scores);
      break;
    case TileFormat::kBF16:
      row_scores<BF16Rows, G>(pass.q, head_dim, page, ahead, scores);
      break;
    default:
      row_scores<F16Rows, G>(pass.q, head_dim, page, ahead, scores);
  }
  if (!page.log_weight) return;
  for (int j = 0; j < kBlockTokens; j += simd::kLanes) {
    const simd::Vec log_weight = simd::load(page.log_weight + j);
    for (int g = 0; g < G; ++g) {
      float* at = scores + g * kScoreStride + j;
      simd::store(at, simd::load(at) + log_weight);
    }
  }
}

// Values in 16 bits; rounded ones are added for all pages at once.
template <int G>
void add_page_values(const Pass<G>& pass, std::int64_t head_dim, const Page& page,
                     TilesAhead& ahead, const float* p) {
  switch (page.tier->v_format) {
    case TileFormat::kBF16:
      return add_row_values<BF16Rows, G>(p, head_dim, page, ahead, pass.o);
    case TileFormat::kF16:
      return add_row_values<F16Rows, G>(p, head_dim, page, ahead, pass.o);
    default:
      return;
  }
}

// Scores, weights and values of all pages.
template <int G>
void attend_pages(Pass<G>& pass, std::int64_t head_dim, const Pages& pages, TilesAhead& ahead) {
  alignas(64) float scores[G * kScoreStride];
  const std::span all(pages.pages, static_cast<std::size_t>(pages.n));
  for (int i = 0; i < pages.n; ++i) {
    page_scores<G>(pass, head_dim, pages.pages[i], ahead, scores + i * kBlockTokens);
  }
  softmax<G>(scores, all, pass);
  for (int i = 0; i < pages.n; ++i) {
    add_page_values<G>(pass, head_dim, pages.pages[i], ahead, scores + i * kBlockTokens);
  }
  if (pages.has(&KvTierLayer::v_format, TileFormat::kQ8_0)) {
    add_q8_values<G>(scores, head_dim, all, ahead, pass.o);
  }
  if (pass.rotated[0]) {
    RoundedValues<Q4Values, G>(scores, head_dim, all).add_to(pass.rotated, ahead);
  }
}

// Query heads [g0, g0 + G) of the group, over all pages.
template <int G>
void attend_heads(const AttentionArgs& args, const Pages& pages, const float* source,
                  TilesAhead& ahead, float* partial) {
  const std::int64_t head_dim = args.kv.head_dim;
  alignas(64) float q[G * kMaxHeadDim];
  alignas(64) float rotated[G * kMaxHeadDim];
  for (std::int64_t i = 0; i < G * head_dim; ++i) q[i] = source[i] * args.scale;
  Pass<G> pass;
  pass.q = q;
  const bool has_q4_keys = pages.has(&KvTierLayer::k_format, TileFormat::kQ4Keys);
  const bool has_q8_keys = pages.has(&KvTierLayer::k_format, TileFormat::kQ8Keys);
  if (has_q4_keys || has_q8_keys) pass.rounded.rotate(q, head_dim);
  if (has_q4_keys || (has_q8_keys && kQ8RoundsQueries)) pass.rounded.round(head_dim);
  const bool is_rotated = pages.has(&KvTierLayer::v_format, TileFormat::kQ4Values);
  if (is_rotated) std::fill_n(rotated, G * head_dim, 0.0f);
  for (int g = 0; g < G; ++g) {
    float* at = partial + g * (head_dim + 2);
    pass.max[g] = at;
    pass.sum[g] = at + 1;
    pass.o[g] = at + 2;
    pass.rotated[g] = is_rotated ? rotated + g * head_dim : nullptr;
    at[0] = kMinusInfinity;
    std::fill(at + 1, at + 2 + head_dim, 0.0f);
  }
  if (pages.n > 0) attend_pages<G>(pass, head_dim, pages, ahead);
  for (int g = 0; is_rotated && g < G; ++g) {
    hadamard_rotate(pass.rotated[g], head_dim);
    for (std::int64_t d = 0; d < head_dim; ++d) pass.o[g][d] += pass.rotated[g][d];
  }
}

void attend_row(const AttentionArgs& args, const AttentionSpan& span, const AttentionItem& item,
                int row, TilesAhead& ahead, float* partial) {
  const std::int64_t head_dim = args.kv.head_dim;
  const std::int64_t group = args.n_head / args.kv.n_head_kv;
  const Pages pages = pages_of(args, span, item, row);
  for (std::int64_t g = 0; g < group; g += kMaxGroup) {
    const float* source =
        args.qkv + (span.row0 + row) * args.qkv_stride + (item.kv_head * group + g) * head_dim;
    float* to = partial + g * (head_dim + 2);
    switch (group - g) {
      case 1:
        attend_heads<1>(args, pages, source, ahead, to);
        break;
      case 2:
        attend_heads<2>(args, pages, source, ahead, to);
        break;
      case 3:
        attend_heads<3>(args, pages, source, ahead, to);
        break;
      default:
        attend_heads<kMaxGroup>(args, pages, source, ahead, to);
    }
  }
}

// out = sum over parts, in their order, of e^(max_part - max) o_part, over the same sum of sums.
void merge_row(const AttentionArgs& args, const AttentionSpan& span, const AttentionItem& item,
               int row, const float* partials, std::int64_t part_stride, int n_parts) {
  const std::int64_t head_dim = args.kv.head_dim;
  const std::int64_t group = args.n_head / args.kv.n_head_kv;
  const std::int64_t wanted = window_row(span, args.layer, row);
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
    if (wanted >= 0) {
      span.window->log_mass[wanted * args.n_head + item.kv_head * group + g] = max + std::log(sum);
    }
    const simd::Vec factor = simd::set1(1.0f / sum);
    for (std::int64_t d = 0; d < head_dim; d += simd::kLanes) {
      simd::store(out + d, simd::load(out + d) * factor);
    }
  }
}

}  // namespace

void attend_part(const AttentionArgs& args, const AttentionItem& item, const PartOrder& order) {
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
  TilesAhead ahead = tiles_ahead(args, item, order);
  for (int row = 0; row < span.n_rows; ++row) {
    float* partial = partials + (item.n_parts == 1 ? 0 : item.first * part_stride) + row * stride;
    attend_row(args, span, item, row, ahead, partial);
  }
  if (item.n_parts > 1) {
    std::atomic<int>& n_done = args.scratch->n_done(item);
    if (n_done.fetch_add(1, std::memory_order_acq_rel) + 1 < item.n_parts) return;
    n_done.store(0, std::memory_order_relaxed);
  }
  for (int row = 0; row < span.n_rows; ++row) {
    const int n_parts = parts_of(span, row);  // later parts hold nothing of this row
    merge_row(args, span, item, row, partials + row * stride, part_stride, n_parts);
  }
}

}  // namespace modularbase::kernels
