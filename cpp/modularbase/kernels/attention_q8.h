#pragma once

#include <bit>
#include <span>

#include "modularbase/kernels/q8_dot.h"
#include "modularbase/kernels/rounded_values.h"

namespace modularbase::kernels {

#ifdef MODULARBASE_Q8_DOT
inline constexpr bool kQ8RoundsQueries = true;

/// scores[g][j] = q_g . k_j for visible tokens, and for some that are not; scores [kScoreStride,
/// G].
template <int G>
void q8_scores(const RoundedQueries<G>& queries, std::int64_t head_dim, const Page& page,
               TilesAhead& ahead, float* scores) {
  const std::int64_t row_bytes = Q8_0Rows::row_bytes(head_dim);
  const std::int64_t n_groups = head_dim / kRoundedGroup;
  Q8Scales scales;
  scales.load(page.k, head_dim);
  constexpr int kRuns = kBlockTokens / simd::kLanes;
  Prefetch prefetch = ahead.take(kBlockTokens * row_bytes, kRuns * n_groups);
  for (int j = 0; j < kBlockTokens; j += simd::kLanes) {
    if ((page.visible >> j & 0xffff) == 0) continue;
    simd::Vec total[G];
    for (simd::Vec& v : total) v = simd::zero();
    for (std::int64_t group = 0; group < n_groups; ++group) {
      prefetch.step();
      const DotFactors<kRoundedGroup>* factors = queries.factors[group];
      // Kept from leaving the loop: there are far more factors than registers.
      asm volatile("" : "+r"(factors));
      __m512i columns[8];
      load_columns(page.k + j * row_bytes + group * Q8_0Rows::kGroupBytes, row_bytes, columns);
      Q8Sum sums[G];
      for (int g = 0; g < G; ++g) sums[g].take_offset(queries.sum[group][g]);
      for (int i = 0; i < 8; ++i) {
        for (int g = 0; g < G; ++g) sums[g].add(columns[i], factors[g], 4 * i);
      }
      const simd::Vec scale = simd::load_f16(scales.of[group] + j);
      for (int g = 0; g < G; ++g) {
        total[g] = simd::fma(sums[g].lanes(), scale, total[g]);
      }
    }
    for (int g = 0; g < G; ++g) {
      simd::store(scores + g * kScoreStride + j, total[g] * simd::set1(queries.scale[g]));
    }
  }
}

/// How RoundedValues reads 8-bit values.
class Q8Values {
 public:
  static constexpr TileFormat kFormat = TileFormat::kQ8_0;
  static constexpr float kOffset = kQ8Offset;
  static constexpr int kSteps = kBlockTokens / 4;
  template <int G>
  class Dot {
   public:
    void add(int i, __m512i bytes, const DotFactors<kBlockTokens>* factors, int first) {
      for (int g = 0; g < G; ++g) sums_[i][g].add(bytes, factors[g], first);
    }
    void lanes(int i, int g, simd::Vec* sums) const { sums[0] = sums_[i][g].lanes(); }

   private:
    Q8Sum sums_[2][G];
  };

  Q8Values(std::span<const Page> pages, std::int64_t head_dim)
      : row_bytes_(Q8_0Rows::row_bytes(head_dim)) {
    for (std::size_t i = 0; i < pages.size(); ++i) {
      if (pages[i].tier->v_format == kFormat) scales_[i].load(pages[i].v, head_dim);
    }
  }

  const std::uint16_t* scales(std::size_t i, std::int64_t group) const {
    return scales_[i].of[group];
  }

  template <int G>
  [[gnu::always_inline]] void add(const Page& page, std::int64_t group,
                                  const DotFactors<kBlockTokens>* factors, Prefetch prefetch,
                                  Dot<G>& dot) const {
    const std::byte* row = page.v + group * Q8_0Rows::kGroupBytes;
    const int n_tokens = std::bit_width(page.visible);
    for (int j = 0; j < n_tokens; j += 4, row += 4 * row_bytes_) {
      prefetch.step();
      const __m512i rows01 = load_two(row, row + row_bytes_);
      const __m512i rows23 = load_two(row + 2 * row_bytes_, row + 3 * row_bytes_);
      for (int i = 0; i < 2; ++i) dot.add(i, interleave(rows01, rows23, 16 * i), factors, j);
    }
  }

 private:
  std::int64_t row_bytes_;
  Q8Scales scales_[kMaxPages];
};

template <int G>
void add_q8_values(const float* p, std::int64_t head_dim, std::span<const Page> pages,
                   TilesAhead& ahead, float* const* o) {
  RoundedValues<Q8Values, G>(p, head_dim, pages).add_to(o, ahead);
}
#else
inline constexpr bool kQ8RoundsQueries = false;

template <int G>
void q8_scores(const RoundedQueries<G>& queries, std::int64_t head_dim, const Page& page,
               TilesAhead& ahead, float* scores) {
  row_scores<Q8_0Rows, G>(queries.rotated, head_dim, page, ahead, scores);
}

template <int G>
void add_q8_values(const float* p, std::int64_t head_dim, std::span<const Page> pages,
                   TilesAhead& ahead, float* const* o) {
  for (const Page& page : pages) {
    if (page.tier->v_format == TileFormat::kQ8_0) {
      add_row_values<Q8_0Rows, G>(p, head_dim, page, ahead, o);
    }
    p += kBlockTokens;
  }
}
#endif

}  // namespace modularbase::kernels
