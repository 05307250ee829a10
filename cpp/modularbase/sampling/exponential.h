#pragma once

#include <bit>
#include <cstdint>

namespace modularbase {

/// e^x for x <= 0, within 2 units in the last place; 0 where the result would be below 2^-125.
/// Unlike std::exp it is the same on every platform and a compiler can vectorise loops over it.
inline float exp_nonpositive(float x) {
  constexpr float kLowest = -86.6f;  // about ln 2^-125
  constexpr float kLog2e = 1.44269504f;
  constexpr float kLn2High = 0.693359375f;  // few bits, so that n * kLn2High is exact
  constexpr float kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float bounded = x > kLowest ? x : kLowest;
  const float shifted = bounded * kLog2e + kRound;
  const float n = shifted - kRound;
  const float r = (bounded - n * kLn2High) - n * kLn2Low;  // |r| <= ln(2) / 2
  float poly = 1.9875691500e-4f;                           // Cephes' expf
  poly = poly * r + 1.3981999507e-3f;
  poly = poly * r + 8.3334519073e-3f;
  poly = poly * r + 4.1665795894e-2f;
  poly = poly * r + 1.6666665459e-1f;
  poly = poly * r + 5.0000001201e-1f;
  poly = (poly * r * r + r) + 1.0f;
  const auto steps = std::bit_cast<std::int32_t>(shifted) - std::bit_cast<std::int32_t>(kRound);
  const float scale = std::bit_cast<float>((steps + 127) << 23);  // 2^n
  return x > kLowest ? poly * scale : 0.0f;
}

}  // namespace modularbase
