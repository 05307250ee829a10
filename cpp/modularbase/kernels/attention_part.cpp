// Attention of the few rows of a short span over one part of what they see: reads each key and
// value once for all query heads of the group.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <memory>
#include <span>

#include "modularbase/kernels/attention_q4.h"
#include "modularbase/kernels/attention_rows.h"
#include "modularbase/kernels/attention_scratch.h"

namespace modularbase::kernels {
namespace {

constexpr int kMaxGroup = 4;  // query heads per pass: their sums fit the registers
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

/// The blocks of a part that show something to a row.
struct Pages {
  Page pages[kPartPages];
  int n = 0;
  // Softmax takes so many pages at once: segments are all there, positions come one block after
  // another so that a row's result is the same at every length of its sequence.
  int n_at_once = 1;

  void add(const Page& page) { pages[n++] = page; }
  bool has(TileFormat KvTierLayer::* kind, TileFormat format) const {
    return std::any_of(pages, pages + n,
                       [&](const Page& page) { return page.tier->*kind == format; });
  }
};

Pages pages_of(const AttentionArgs& args, const AttentionSpan& span, const AttentionItem& item,
               int row) {
  Pages result;
  const int n_segment_parts = segment_parts(span);
  if (item.first < n_segment_parts) {
    result.n_at_once = kPartPages;
    const int begin = item.first * kPartPages;
    const int end = std::min(begin + kPartPages, span.n_segments);
    for (int i = begin; i < end; ++i) {
      const KvSegment& segment = span.segments[i];
      if (segment.visible == 0 || !args.kv.tiers[segment.tier].has(item.kv_head)) continue;
      result.add(page_of(args.kv, segment.tier, segment.block, item.kv_head, segment.visible));
    }
    return result;
  }
  const int begin = (span.first / kPartTokens + item.first - n_segment_parts) * kPartTokens;
  const int end = std::min(begin + kPartTokens, span.pos0 + row + 1);
  for (int at = begin; at < end; at += kBlockTokens) {
    const int first = std::max(span.first - at, 0);
    if (first >= kBlockTokens) continue;
    const std::uint64_t visible = token_bits(first, std::min(kBlockTokens, end - at));
    const std::int32_t block = span.block_table[at / kBlockTokens];
    result.add(page_of(args.kv, kExactTier, block, item.kv_head, visible));
  }
  return result;
}

// The tiles of an item in the order in which they are read, for the last row, which sees all.
std::size_t add_tiles(const AttentionArgs& args, const AttentionItem& item, std::size_t n_skipped,
                      TilesAhead* ahead) {
  const AttentionSpan& span = args.batch->spans[item.span];
  const Pages pages = pages_of(args, span, item, span.n_rows - 1);
  std::size_t n_bytes = 0;
  const auto add = [&](const std::byte* tile, TileFormat format) {
    const std::size_t n = tile_bytes(format, args.kv.head_dim);
    n_bytes += n;
    if (n_skipped > 0) {
      --n_skipped;
    } else if (ahead) {
      ahead->add(tile, n);
    }
  };
  for (int first = 0; first < pages.n; first += pages.n_at_once) {
    const int end = std::min(first + pages.n_at_once, pages.n);
    for (int i = first; i < end; ++i) add(pages.pages[i].k, pages.pages[i].tier->k_format);
    for (int i = first; i < end; ++i) add(pages.pages[i].v, pages.pages[i].tier->v_format);
  }
  return n_bytes;
}

// What is read after an item is fetched while the item's rows are computed; a thread's first item
// has been fetched by nobody.
TilesAhead tiles_ahead(const AttentionArgs& args, const AttentionItem& item,
                       const PartOrder& order) {
  TilesAhead ahead;
  const std::size_t n_bytes = add_tiles(args, item, 1, order.is_first ? &ahead : nullptr);
  if (order.next) add_tiles(args, *order.next, 0, &ahead);
  const auto n_rows = static_cast<std::size_t>(args.batch->spans[item.span].n_rows);
  if (n_bytes > 0) ahead.spread(n_bytes * n_rows);
  return ahead;
}

/// The query heads of one pass and what each has gathered: out = (o + H rotated) / sum.
template <int G>
struct Pass {
  Q4Queries<G> q4;
  const float* q;          // [head_dim, G], scaled
  const float* q_rotated;  // the same times H, where keys are in 8 bits
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

// Turns scores into weights relative to the running maximum, rescaling what was gathered before
// (never rotated values: only segments have those, and they come all at once).
template <int G>
void online_softmax(float* scores, std::span<const Page> pages, std::int64_t head_dim, int g,
                    Pass<G>& pass) {
  const simd::Vec none = simd::set1(kMinusInfinity);
  simd::Vec maxima = none;
  for_each_vector(pages, [&](std::size_t at, std::uint64_t visible) {
    const simd::Vec masked = simd::select(visible, simd::load(scores + at), none);
    simd::store(scores + at, masked);
    maxima = simd::max(maxima, masked);
  });
  const float new_max = std::max(*pass.max[g], simd::max_lanes(maxima));
  // 0 for the first block: e^-inf
  const float shrink = *pass.max[g] == new_max ? 1.0f : std::exp(*pass.max[g] - new_max);
  const simd::Vec shift = simd::set1(-new_max);
  simd::Vec sums = simd::zero();
  for_each_vector(pages, [&](std::size_t at, std::uint64_t visible) {
    const simd::Vec weight = simd::exp(simd::load(scores + at) + shift);
    const simd::Vec masked = simd::select(visible, weight, simd::zero());
    simd::store(scores + at, masked);
    sums = sums + masked;
  });
  float lanes[simd::kLanes];
  simd::store(lanes, sums);
  float sum = 0.0f;
  for (const float lane : lanes) sum += lane;
  *pass.sum[g] = *pass.sum[g] * shrink + sum;
  *pass.max[g] = new_max;
  if (shrink == 1.0f) return;
  const simd::Vec factor = simd::set1(shrink);
  for (std::int64_t d = 0; d < head_dim; d += simd::kLanes) {
    simd::store(pass.o[g] + d, simd::load(pass.o[g] + d) * factor);
  }
}

template <int G>
void page_scores(const Pass<G>& pass, std::int64_t head_dim, const Page& page, TilesAhead& ahead,
                 float* scores) {
  const TileFormat format = page.tier->k_format;
  const bool is_q4 = format == TileFormat::kQ4Keys;
  const auto n_steps = is_q4 ? 2 * head_dim / kQ4Group : kBlockTokens / 4;
  const Prefetch prefetch = ahead.take(tile_bytes(format, head_dim), static_cast<int>(n_steps));
  switch (format) {
    case TileFormat::kQ4Keys:
      q4_scores<G>(pass.q, pass.q4, head_dim, page, prefetch, scores);
      break;
    case TileFormat::kQ8Keys:
      row_scores<Q8_0Rows, G>(pass.q_rotated, head_dim, page, prefetch, scores);
      break;
    case TileFormat::kBF16:
      row_scores<BF16Rows, G>(pass.q, head_dim, page, prefetch, scores);
      break;
    default:
      row_scores<F16Rows, G>(pass.q, head_dim, page, prefetch, scores);
  }
  if (!page.log_weight) return;
  for (int j = 0; j < kBlockTokens; j += simd::kLanes) {
    const simd::Vec log_weight = simd::load(page.log_weight + j);
    for (int g = 0; g < G; ++g) {
      float* at = scores + g * kPartTokens + j;
      simd::store(at, simd::load(at) + log_weight);
    }
  }
}

template <int G>
void add_page_values(const Pass<G>& pass, std::int64_t head_dim, const Page& page,
                     TilesAhead& ahead, const float* p) {
  const TileFormat format = page.tier->v_format;
  const auto n_steps = format == TileFormat::kQ4Values ? head_dim / kQ4Group : kBlockTokens;
  const Prefetch prefetch = ahead.take(tile_bytes(format, head_dim), static_cast<int>(n_steps));
  switch (format) {
    case TileFormat::kQ4Values:
      add_q4_values<G>(p, head_dim, page, prefetch, pass.rotated);
      break;
    case TileFormat::kQ8_0:
      add_row_values<Q8_0Rows, G>(p, head_dim, page, prefetch, pass.o);
      break;
    case TileFormat::kBF16:
      add_row_values<BF16Rows, G>(p, head_dim, page, prefetch, pass.o);
      break;
    default:
      add_row_values<F16Rows, G>(p, head_dim, page, prefetch, pass.o);
  }
}

// Scores, weights and values of pages [begin, end).
template <int G>
void attend_pages(Pass<G>& pass, std::int64_t head_dim, const Pages& pages, int begin, int end,
                  TilesAhead& ahead) {
  alignas(64) float scores[G * kPartTokens];
  const std::span at_once(pages.pages + begin, pages.pages + end);
  float* at = scores;
  for (const Page& page : at_once) {
    page_scores<G>(pass, head_dim, page, ahead, at);
    at += kBlockTokens;
  }
  for (int g = 0; g < G; ++g) {
    online_softmax<G>(scores + g * kPartTokens, at_once, head_dim, g, pass);
  }
  at = scores;
  for (const Page& page : at_once) {
    add_page_values<G>(pass, head_dim, page, ahead, at);
    at += kBlockTokens;
  }
}

// Query heads [g0, g0 + G) of the group, over all pages.
template <int G>
void attend_heads(const AttentionArgs& args, const Pages& pages, const float* source,
                  TilesAhead& ahead, float* partial) {
  const std::int64_t head_dim = args.kv.head_dim;
  alignas(64) float q[G * kMaxHeadDim];
  alignas(64) float q_rotated[G * kMaxHeadDim];
  alignas(64) float rotated[G * kMaxHeadDim];
  for (std::int64_t i = 0; i < G * head_dim; ++i) q[i] = source[i] * args.scale;
  Pass<G> pass;
  pass.q = q;
  pass.q_rotated = q_rotated;
  if (pages.has(&KvTierLayer::k_format, TileFormat::kQ8Keys)) {
    std::copy_n(q, G * head_dim, q_rotated);
    hadamard_rotate_rows(q_rotated, G, head_dim);
  }
  if (pages.has(&KvTierLayer::k_format, TileFormat::kQ4Keys)) pass.q4.round(q, head_dim);
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
  for (int i = 0; i < pages.n; i += pages.n_at_once) {
    attend_pages<G>(pass, head_dim, pages, i, std::min(i + pages.n_at_once, pages.n), ahead);
  }
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
