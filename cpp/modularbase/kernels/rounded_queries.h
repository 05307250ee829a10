#pragma once

#include <algorithm>

#include "modularbase/kernels/attention.h"
#include "modularbase/kernels/dot_factors.h"
#include "modularbase/kernels/hadamard.h"

namespace modularbase::kernels {

inline constexpr int kRoundedGroup = 32;  // dims of a token that share a scale
inline constexpr int kMaxGroups = kMaxHeadDim / kRoundedGroup;

/// The queries of G heads as rounded keys want them: rotated, and as whole numbers of 16 bits of a
/// head's largest.
template <int G>
struct RoundedQueries {
  alignas(64) float rotated[G * kMaxHeadDim];  // [head_dim, G]
  DotFactors<kRoundedGroup> factors[kMaxGroups][G];
  std::int32_t sum[kMaxGroups][G];  // of the factors
  float scale[G];

  /// q [head_dim, G]
  void rotate(const float* q, std::int64_t head_dim) {
    std::copy_n(q, G * head_dim, rotated);
    hadamard_rotate_rows(rotated, G, head_dim);
  }

  /// After rotate().
  void round(std::int64_t head_dim) {
    for (int g = 0; g < G; ++g) {
      const float* q = rotated + g * head_dim;
      simd::Vec largest = simd::zero();
      for (std::int64_t d = 0; d < head_dim; d += simd::kLanes) {
        const simd::Vec v = simd::load(q + d);
        largest = simd::max(largest, simd::max(v, simd::zero() - v));
      }
      scale[g] = std::max(simd::max_lanes(largest), 1e-30f) / kLargestFactor;
      const simd::Vec inverse = simd::set1(1.0f / scale[g]);
      for (std::int64_t group = 0; group < head_dim / kRoundedGroup; ++group) {
        simd::Vec numbers[kRoundedGroup / simd::kLanes];
        for (simd::Vec& v : numbers) {
          v = simd::load(q) * inverse;
          q += simd::kLanes;
        }
        FactorSum total;
        round_factors(numbers, factors[group][g], total);
        sum[group][g] = total.total();
      }
    }
  }
};

}  // namespace modularbase::kernels
