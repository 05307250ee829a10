#pragma once

#include <cstdint>

#include "modularbase/kernels/attention.h"

namespace modularbase::kernels {

/// Turns the pairs of a head by their angles (Su et al., arXiv:2104.09864), in place.
/// cos, sin: [rope_dim / 2]
inline void rope_rotate(float* x, const float* cos, const float* sin, std::int64_t rope_dim,
                        RopeStyle style) {
  const std::int64_t half = rope_dim / 2;
  const std::int64_t step = style == RopeStyle::kNormal ? 2 : 1;
  const std::int64_t partner = style == RopeStyle::kNormal ? 1 : half;
  for (std::int64_t i = 0; i < half; ++i) {
    float* a = x + i * step;
    const float first = a[0];
    const float second = a[partner];
    a[0] = first * cos[i] - second * sin[i];
    a[partner] = first * sin[i] + second * cos[i];
  }
}

}  // namespace modularbase::kernels
