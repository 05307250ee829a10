#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace modularbase::kernels {

inline constexpr std::int64_t kMaxHadamard = 128;

/// Numbers that one rotation mixes: the largest power of two that divides head_dim, at most 128.
inline std::int64_t hadamard_size(std::int64_t head_dim) {
  return std::min(head_dim & -head_dim, kMaxHadamard);
}

namespace detail {

using Floats16 = float __attribute__((vector_size(64)));

// The butterflies inside 16 numbers: each number plus its partner, or the partner minus it.
inline Floats16 rotate_16(Floats16 x) {
  constexpr Floats16 kBy1 = {1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1};
  constexpr Floats16 kBy2 = {1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1};
  constexpr Floats16 kBy4 = {1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1};
  constexpr Floats16 kBy8 = {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1};
  x = __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14) +
      x * kBy1;
  x = __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13) +
      x * kBy2;
  x = __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11) +
      x * kBy4;
  return __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7) +
         x * kBy8;
}

// x = H x for 16 kVecs numbers.
template <int kVecs>
inline void rotate_vecs(float* x, float scale) {
  Floats16 v[kVecs];
  std::memcpy(v, x, sizeof(v));
  for (Floats16& part : v) part = rotate_16(part) * scale;
  for (int half = 1; half < kVecs; half *= 2) {
    for (int pair = 0; pair < kVecs / 2; ++pair) {
      const int i = pair / half * 2 * half + pair % half;
      const Floats16 a = v[i];
      v[i] = a + v[i + half];
      v[i + half] = a - v[i + half];
    }
  }
  std::memcpy(x, v, sizeof(v));
}

}  // namespace detail

/// x [head_dim] = H x in place, hadamard_size(head_dim) numbers at a time; head_dim is a multiple
/// of 16. H is Sylvester's Hadamard matrix over sqrt(n), its own inverse, in n log2 n additions.
inline void hadamard_rotate(float* x, std::int64_t head_dim) {
  const std::int64_t n = hadamard_size(head_dim);
  const float scale = 1.0f / std::sqrt(static_cast<float>(n));
  for (float* part = x; part < x + head_dim; part += n) {
    switch (n) {
      case 16:
        detail::rotate_vecs<1>(part, scale);
        break;
      case 32:
        detail::rotate_vecs<2>(part, scale);
        break;
      case 64:
        detail::rotate_vecs<4>(part, scale);
        break;
      default:
        detail::rotate_vecs<8>(part, scale);
    }
  }
}

/// The same for n_rows of them.
inline void hadamard_rotate_rows(float* rows, std::int64_t n_rows, std::int64_t head_dim) {
  for (std::int64_t row = 0; row < n_rows; ++row) hadamard_rotate(rows + row * head_dim, head_dim);
}

}  // namespace modularbase::kernels
