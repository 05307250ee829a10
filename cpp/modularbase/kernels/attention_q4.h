#pragma once

#include "modularbase/kernels/attention_types.h"
#include "modularbase/kernels/hadamard.h"
#include "modularbase/kernels/kv_tile_q4.h"
#include "modularbase/kernels/q4_dot.h"

namespace modularbase::kernels {

inline constexpr int kMaxQ4Groups = kMaxHeadDim / kQ4Group;

/// The queries of G heads as 4-bit keys want them: rotated, 16 bits.
template <int G>
struct Q4Queries {
  Q4Factors<kQ4Group> factors[kMaxQ4Groups][G];

  /// q [head_dim, G]
  void round(const float* q, std::int64_t head_dim) {
    alignas(64) float rotated[kMaxQ4Groups * kQ4Group];
    for (int g = 0; g < G; ++g) {
      std::copy_n(q + g * head_dim, head_dim, rotated);
      hadamard_rotate(rotated, head_dim);
      for (std::int64_t group = 0; group < head_dim / kQ4Group; ++group) {
        round_factors(rotated + group * kQ4Group, factors[group][g]);
      }
    }
  }
};

/// scores[g][j] = q_g . k_j for visible tokens, and for some that are not: the dot product with the
/// mean, plus rotated query times rotated key. q [head_dim, G] as it is; scores [kPartTokens, G].
template <int G>
void q4_scores(const float* q, const Q4Queries<G>& queries, std::int64_t head_dim, const Page& page,
               Prefetch ahead, float* scores) {
  const Q4Layout layout = Q4Layout::keys(head_dim);
  const auto* mean = reinterpret_cast<const std::uint16_t*>(page.k);
  const auto* scales = reinterpret_cast<const std::uint16_t*>(page.k + layout.scales());
  const auto* run = reinterpret_cast<const std::uint8_t*>(page.k + layout.nibbles());
  const std::int64_t run_stride = layout.n_groups() * kQ4KeyRunBytes;
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
      for (int g = 0; g < G; ++g) std::fill_n(half[g], kQ4Vecs, simd::set1(of_mean[g]));
    }
    for (std::int64_t group = 0; group < layout.n_groups(); ++group, run += kQ4KeyRunBytes) {
      ahead.step();
      simd::Vec dots[2][G][kQ4Vecs];
      q4_dot<G, kQ4Group>(run, run_stride, queries.factors[group], dots);
      const std::uint16_t* scale_at = scales + group * kBlockTokens + j;
      for (int i = 0; i < 2; ++i) {
        for (int v = 0; v < kQ4Vecs; ++v, scale_at += simd::kLanes) {
          const simd::Vec scale = simd::load_f16(scale_at);
          for (int g = 0; g < G; ++g) {
            total[i][g][v] = simd::fma(dots[i][g][v], scale, total[i][g][v]);
          }
        }
      }
    }
    for (int g = 0; g < G; ++g) {
      float* to = scores + g * kPartTokens + j;
      for (const auto& half : total) {
        for (int v = 0; v < kQ4Vecs; ++v, to += simd::kLanes) simd::store(to, half[g][v]);
      }
    }
  }
}

/// o_g += sum_j p[g][j] H v_j over visible tokens; p [kPartTokens, G], o[g] [head_dim], rotated.
template <int G>
void add_q4_values(const float* p, std::int64_t head_dim, const Page& page, Prefetch ahead,
                   float* const* o) {
  const Q4Layout layout = Q4Layout::values(head_dim);
  const auto* scales = reinterpret_cast<const std::uint16_t*>(page.v + layout.scales());
  const auto* run = reinterpret_cast<const std::uint8_t*>(page.v + layout.nibbles());
  for (std::int64_t d = 0; d < head_dim; d += kQ4Group, run += 2 * kQ4ValueRunBytes) {
    ahead.step();
    Q4Factors<kBlockTokens> factors[G];
    for (int g = 0; g < G; ++g) {
      alignas(64) float weights[kBlockTokens];
      for (int j = 0; j < kBlockTokens; j += simd::kLanes) {
        const simd::Vec weight = simd::load(p + g * kPartTokens + j) * simd::load_f16(scales + j);
        simd::store(weights + j, simd::select(page.visible >> j, weight, simd::zero()));
      }
      round_factors(weights, factors[g]);
    }
    scales += kBlockTokens;
    simd::Vec dots[2][G][kQ4Vecs];
    q4_dot<G, kBlockTokens>(run, kQ4ValueRunBytes, factors, dots);
    for (int g = 0; g < G; ++g) {
      float* to = o[g] + d;
      for (const auto& half : dots) {
        for (int v = 0; v < kQ4Vecs; ++v, to += simd::kLanes) {
          simd::store(to, simd::load(to) + half[g][v]);
        }
      }
    }
  }
}

}  // namespace modularbase::kernels
