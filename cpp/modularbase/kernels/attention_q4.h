#pragma once

#include <span>

#include "modularbase/kernels/q4_dot.h"
#include "modularbase/kernels/rounded_queries.h"
#include "modularbase/kernels/tiles_ahead.h"

namespace modularbase::kernels {

/// scores[g][j] = q_g . k_j for visible tokens, and for some that are not: the dot product with the
/// mean, plus rotated query times rotated key. q [head_dim, G] as it is; scores [kScoreStride, G].
template <int G>
void q4_scores(const float* q, const RoundedQueries<G>& queries, std::int64_t head_dim,
               const Page& page, TilesAhead& ahead, float* scores) {
  const Q4Layout layout = Q4Layout::keys(head_dim);
  const auto* mean = reinterpret_cast<const std::uint16_t*>(page.k);
  const auto* scales = reinterpret_cast<const std::uint16_t*>(page.k + layout.scales());
  const auto* run = reinterpret_cast<const std::uint8_t*>(page.k + layout.nibbles());
  const std::int64_t run_stride = layout.n_groups() * kQ4KeyRunBytes;
  Prefetch prefetch = ahead.take(layout.bytes(), 2 * layout.n_groups());
  simd::Vec sums[4] = {simd::zero(), simd::zero(), simd::zero(), simd::zero()};
  for (std::int64_t d = 0; d < head_dim; d += simd::kLanes) {
    const simd::Vec value = simd::load_f16(mean + d);
    for (int g = 0; g < G; ++g) {
      sums[g] = simd::fma(simd::load(q + g * head_dim + d), value, sums[g]);
    }
  }
  float of_mean[4];
  simd::sum_lanes4(sums[0], sums[1], sums[2], sums[3], of_mean);
  for (int j = 0; j < kBlockTokens; j += 2 * kQ4Lanes, run += run_stride) {
    simd::Vec total[2][G][kQ4Vecs];
    for (auto& half : total) {
      for (int g = 0; g < G; ++g) std::fill_n(half[g], kQ4Vecs, simd::zero());
    }
    for (std::int64_t group = 0; group < layout.n_groups(); ++group, run += kQ4KeyRunBytes) {
      prefetch.step();
      Q4Dot<G> dot;
      dot.take_offset(queries.sum[group]);
      dot.add(run, run_stride, queries.factors[group]);
      const std::uint16_t* scale_at = scales + group * kBlockTokens + j;
      for (int i = 0; i < 2; ++i, scale_at += kQ4Lanes) {
        for (int g = 0; g < G; ++g) {
          simd::Vec lanes[kQ4Vecs];
          dot.lanes(i, g, lanes);
          for (int v = 0; v < kQ4Vecs; ++v) {
            const simd::Vec scale = simd::load_f16(scale_at + v * simd::kLanes);
            total[i][g][v] = simd::fma(lanes[v], scale, total[i][g][v]);
          }
        }
      }
    }
    for (int g = 0; g < G; ++g) {
      const simd::Vec scale = simd::set1(queries.scale[g]);
      float* to = scores + g * kScoreStride + j;
      for (const auto& half : total) {
        for (int v = 0; v < kQ4Vecs; ++v, to += simd::kLanes) {
          simd::store(to, simd::fma(half[g][v], scale, simd::set1(of_mean[g])));
        }
      }
    }
  }
}

/// How RoundedValues reads 4-bit values.
class Q4Values {
 public:
  static constexpr TileFormat kFormat = TileFormat::kQ4Values;
  static constexpr float kOffset = kQ4Offset;
  static constexpr int kSteps = 1;
  template <int G>
  using Dot = Q4Dot<G>;

  Q4Values(std::span<const Page> pages, std::int64_t head_dim)
      : pages_(pages), layout_(Q4Layout::values(head_dim)) {}

  const std::uint16_t* scales(std::size_t i, std::int64_t group) const {
    return reinterpret_cast<const std::uint16_t*>(pages_[i].v) + group * kBlockTokens;
  }

  template <int G>
  [[gnu::always_inline]] void add(const Page& page, std::int64_t group,
                                  const DotFactors<kBlockTokens>* factors, Prefetch prefetch,
                                  Q4Dot<G>& dot) const {
    prefetch.step();
    const auto* runs = reinterpret_cast<const std::uint8_t*>(page.v + layout_.nibbles());
    dot.add(runs + group * 2 * kQ4ValueRunBytes, kQ4ValueRunBytes, factors);
  }

 private:
  std::span<const Page> pages_;
  Q4Layout layout_;
};

}  // namespace modularbase::kernels
