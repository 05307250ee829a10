#pragma once

#include <algorithm>
#include <span>

#include "modularbase/kernels/dot_factors.h"
#include "modularbase/kernels/rounded_queries.h"
#include "modularbase/kernels/tiles_ahead.h"

namespace modularbase::kernels {

/// o_g += sum_j p[g][j] v_j over visible tokens of the pages whose values have a format; p
/// [kScoreStride, G], o[g] [head_dim]. Weights times scales become whole numbers of 16 bits of the
/// page's largest, for all pages before the first is multiplied.
/// Values says how its format is read: kFormat, scales(i, group) of page i, Dot<G>, which adds up
/// numbers times factors, and kOffset of these numbers.
template <class Values, int G>
class RoundedValues {
 public:
  RoundedValues(const float* p, std::int64_t head_dim, std::span<const Page> pages)
      : values_(pages, head_dim), p_(p), pages_(pages), n_groups_(head_dim / kRoundedGroup) {
    group_bytes_ = static_cast<std::int64_t>(tile_bytes(Values::kFormat, head_dim)) / n_groups_;
  }

  void add_to(float* const* o, TilesAhead& ahead) {
    for (std::int64_t group = 0; group < n_groups_; ++group) {
      round(group, ahead);
      add_group(group, o, ahead);
    }
  }

 private:
  static constexpr int kTokenVecs = kBlockTokens / simd::kLanes;

  template <class F>
  void for_each_page(const F& f) const {
    for (std::size_t i = 0; i < pages_.size(); ++i) {
      if (pages_[i].tier->v_format == Values::kFormat) f(i);
    }
  }
  const float* weights(std::size_t i, int g) const {
    return p_ + g * kScoreStride + i * kBlockTokens;
  }

  void round(std::int64_t group, TilesAhead& ahead) {
    simd::Vec sums[kMaxGroup] = {simd::zero(), simd::zero(), simd::zero(), simd::zero()};
    for_each_page([&](std::size_t i) {
      ahead.take(group_bytes_ / 2, 1).step();
      simd::Vec scaled[G][kTokenVecs];
      float unit[kMaxGroup];
      scale_weights(i, values_.scales(i, group), scaled, unit);
      for (int g = 0; g < G; ++g) {
        const simd::Vec inverse = simd::set1(1.0f / unit[g]);
        for (simd::Vec& v : scaled[g]) v = v * inverse;
        FactorSum sum;
        round_factors(scaled[g], factors_[i][g], sum);
        sums[g] = simd::fma(sum.parts(), simd::set1(unit[g]), sums[g]);
        unit_[i][g] = unit[g];
      }
    });
    simd::sum_lanes4(sums[0], sums[1], sums[2], sums[3], sum_);
  }

  // A page's weights times scales, 0 for invisible tokens, and what factor 1 is to stand for.
  void scale_weights(std::size_t i, const std::uint16_t* scales, simd::Vec (*scaled)[kTokenVecs],
                     float* unit) const {
    simd::Vec largest[kMaxGroup] = {simd::zero(), simd::zero(), simd::zero(), simd::zero()};
    for (int v = 0; v < kTokenVecs; ++v) {
      const int j = v * simd::kLanes;
      const simd::Vec scale =
          simd::select(pages_[i].visible >> j, simd::load_f16(scales + j), simd::zero());
      for (int g = 0; g < G; ++g) {
        const simd::Vec weight =
            simd::select(pages_[i].visible >> j, simd::load(weights(i, g) + j), simd::zero());
        scaled[g][v] = weight * scale;
        largest[g] = simd::max(largest[g], simd::max(scaled[g][v], simd::zero() - scaled[g][v]));
      }
    }
    simd::max_lanes4(largest[0], largest[1], largest[2], largest[3], unit);
    for (int g = 0; g < G; ++g) unit[g] = std::max(unit[g], 1e-30f) / kLargestFactor;
  }

  void add_group(std::int64_t group, float* const* o, TilesAhead& ahead) {
    constexpr int kVecs = kRoundedGroup / 2 / simd::kLanes;
    simd::Vec total[G][2][kVecs];
    for (int g = 0; g < G; ++g) {
      const simd::Vec offset = simd::set1(-Values::kOffset * sum_[g]);
      for (auto& half : total[g]) std::fill_n(half, kVecs, offset);
    }
    for_each_page([&](std::size_t i) {
      typename Values::template Dot<G> dot;
      values_.add(pages_[i], group, factors_[i], ahead.take(group_bytes_ / 2, Values::kSteps), dot);
      for (int g = 0; g < G; ++g) {
        const simd::Vec unit = simd::set1(unit_[i][g]);
        for (int half = 0; half < 2; ++half) {
          simd::Vec sums[kVecs];
          dot.lanes(half, g, sums);
          for (int v = 0; v < kVecs; ++v) {
            total[g][half][v] = simd::fma(sums[v], unit, total[g][half][v]);
          }
        }
      }
    });
    for (int g = 0; g < G; ++g) {
      float* to = o[g] + group * kRoundedGroup;
      for (const auto& half : total[g]) {
        for (int v = 0; v < kVecs; ++v, to += simd::kLanes) {
          simd::store(to, simd::load(to) + half[v]);
        }
      }
    }
  }

  // unit_ is what factor 1 of a page stands for, sum_ that of all factors times their units; of the
  // group at hand.
  DotFactors<kBlockTokens> factors_[kMaxPages][G];
  Values values_;
  float unit_[kMaxPages][G];
  float sum_[kMaxGroup];
  const float* p_;
  std::span<const Page> pages_;
  std::int64_t n_groups_;
  std::int64_t group_bytes_;
};

}  // namespace modularbase::kernels
