#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace modularbase::kernels {

inline constexpr std::int64_t kMaxHadamard = 128;

/// Numbers that one rotation mixes: the largest power of two that divides head_dim, at most 128.
inline std::int64_t hadamard_size(std::int64_t head_dim) {
  return std::min(head_dim & -head_dim, kMaxHadamard);
}

/// x [head_dim] = H x in place, each hadamard_size(head_dim) numbers by themselves; H is its own
/// inverse. Sylvester's matrix over sqrt(n) in n log2 n additions.
inline void hadamard_rotate(float* x, std::int64_t head_dim) {
  const std::int64_t n = hadamard_size(head_dim);
  const float scale = 1.0f / std::sqrt(static_cast<float>(n));
  for (float* part = x; part < x + head_dim; part += n) {
    for (std::int64_t half = 1; half < n; half *= 2) {
      for (std::int64_t i = 0; i < n; i += 2 * half) {
        for (std::int64_t j = i; j < i + half; ++j) {
          const float a = part[j];
          const float b = part[j + half];
          part[j] = a + b;
          part[j + half] = a - b;
        }
      }
    }
    for (std::int64_t i = 0; i < n; ++i) part[i] *= scale;
  }
}

}  // namespace modularbase::kernels
