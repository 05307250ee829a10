#pragma once

#include <bit>

#include "modularbase/kernels/tiles_ahead.h"

namespace modularbase::kernels {

/// How the rows of a format become floats.
struct F16Rows {
  static std::int64_t row_bytes(std::int64_t head_dim) { return 2 * head_dim; }
  static simd::Vec load(const std::byte* row, std::int64_t d) {
    return simd::load_f16(reinterpret_cast<const std::uint16_t*>(row) + d);
  }
};
struct BF16Rows {
  static std::int64_t row_bytes(std::int64_t head_dim) { return 2 * head_dim; }
  static simd::Vec load(const std::byte* row, std::int64_t d) {
    return simd::load_bf16(reinterpret_cast<const std::uint16_t*>(row) + d);
  }
};
struct Q8_0Rows {
  static constexpr std::int64_t kGroup = 32;
  static constexpr std::int64_t kGroupBytes = 34;  // F16 scale, 32 signed bytes

  static std::int64_t row_bytes(std::int64_t head_dim) { return head_dim / kGroup * kGroupBytes; }
  static simd::Vec load(const std::byte* row, std::int64_t d) {
    const std::byte* group = row + d / kGroup * kGroupBytes;
    const auto* bytes = reinterpret_cast<const std::int8_t*>(group + 2) + d % kGroup;
    return simd::load_s8(bytes) * simd::set1_f16(*reinterpret_cast<const std::uint16_t*>(group));
  }
};

/// scores[g][j] = q_g . k_j for visible tokens, and for some that are not; q [head_dim, G], scores
/// [kScoreStride, G].
template <class Rows, int G>
void row_scores(const float* q, std::int64_t head_dim, const Page& page, TilesAhead& ahead,
                float* scores) {
  const std::int64_t row_bytes = Rows::row_bytes(head_dim);
  Prefetch prefetch = ahead.take(kBlockTokens * row_bytes, kBlockTokens / 4);
  for (int j = 0; j < kBlockTokens; j += 4) {
    if ((page.visible >> j & 15) == 0) continue;
    prefetch.step();
    simd::Vec sums[4][G];
    for (auto& row : sums) {
      for (simd::Vec& sum : row) sum = simd::zero();
    }
    const std::byte* key = page.k + j * row_bytes;
    for (std::int64_t d = 0; d < head_dim; d += simd::kLanes) {
      simd::Vec query[G];
      for (int g = 0; g < G; ++g) query[g] = simd::load(q + g * head_dim + d);
      for (int t = 0; t < 4; ++t) {
        const simd::Vec value = Rows::load(key + t * row_bytes, d);
        for (int g = 0; g < G; ++g) sums[t][g] = simd::fma(query[g], value, sums[t][g]);
      }
    }
    for (int g = 0; g < G; ++g) {
      simd::sum_lanes4(sums[0][g], sums[1][g], sums[2][g], sums[3][g],
                       scores + g * kScoreStride + j);
    }
  }
}

// Calls f with every visible token; those of a block that has been filled in order, fastest.
template <class F>
void for_each_visible(std::uint64_t visible, const F& f) {
  if ((visible & (visible + 1)) == 0) {
    const int n = std::bit_width(visible);
    for (int j = 0; j < n; ++j) f(j);
  } else {
    for (; visible != 0; visible &= visible - 1) f(std::countr_zero(visible));
  }
}

/// o_g += sum_j p[g][j] v_j over visible tokens; p [kScoreStride, G], o[g] [head_dim].
template <class Rows, int G>
void add_row_values(const float* p, std::int64_t head_dim, const Page& page, TilesAhead& ahead,
                    float* const* o) {
  constexpr int kVecs = 4;
  const std::int64_t row_bytes = Rows::row_bytes(head_dim);
  Prefetch prefetch = ahead.take(kBlockTokens * row_bytes, kBlockTokens);
  const auto run = [&]<int N>(std::int64_t d) {
    simd::Vec sums[G][N];
    for (int g = 0; g < G; ++g) {
      for (int i = 0; i < N; ++i) sums[g][i] = simd::load(o[g] + d + i * simd::kLanes);
    }
    for_each_visible(page.visible, [&](int j) {
      prefetch.step();
      simd::Vec value[N];
      for (int i = 0; i < N; ++i) {
        value[i] = Rows::load(page.v + j * row_bytes, d + i * simd::kLanes);
      }
      for (int g = 0; g < G; ++g) {
        const simd::Vec weight = simd::set1(p[g * kScoreStride + j]);
        for (int i = 0; i < N; ++i) sums[g][i] = simd::fma(weight, value[i], sums[g][i]);
      }
    });
    for (int g = 0; g < G; ++g) {
      for (int i = 0; i < N; ++i) simd::store(o[g] + d + i * simd::kLanes, sums[g][i]);
    }
  };
  std::int64_t d = 0;
  for (; d + kVecs * simd::kLanes <= head_dim; d += kVecs * simd::kLanes) {
    run.template operator()<kVecs>(d);
  }
  for (; d < head_dim; d += simd::kLanes) run.template operator()<1>(d);
}

}  // namespace modularbase::kernels
