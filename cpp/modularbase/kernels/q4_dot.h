#pragma once

#include <cstdint>
#include <cstring>

#include "modularbase/kernels/q4_factors.h"

namespace modularbase::kernels {

inline constexpr int kQ4Vecs = kQ4Lanes / simd::kLanes;

/// sums[i][g] = what the 16 lanes' half-bytes times factors[g] add up to, for two runs of N numbers
/// a lane that begin run_stride bytes apart.
#ifdef MODULARBASE_Q4_VNNI
template <int G, int N>
[[gnu::always_inline]] inline void q4_dot(const std::uint8_t* run, std::int64_t run_stride,
                                          const Q4Factors<N>* factors,
                                          simd::Vec (*sums)[G][kQ4Vecs]) {
  // Kept from leaving the caller's loop: there are far more factors than registers.
  asm volatile("" : "+r"(factors));
  const __m512i low_half = _mm512_set1_epi8(15);
  __m512i high[2][G], low[2][G];
  for (int g = 0; g < G; ++g) {
    high[0][g] = high[1][g] = _mm512_setzero_si512();
    low[0][g] = low[1][g] = _mm512_set1_epi32(factors[g].start);
  }
  const auto add = [&](const __m512i* half_bytes, int first) {
    for (int g = 0; g < G; ++g) {
      std::int32_t four[2];
      std::memcpy(&four[0], factors[g].high + first, sizeof(four[0]));
      std::memcpy(&four[1], factors[g].low + first, sizeof(four[1]));
      const __m512i by_high = _mm512_set1_epi32(four[0]);
      const __m512i by_low = _mm512_set1_epi32(four[1]);
      for (int i = 0; i < 2; ++i) {
        high[i][g] = _mm512_dpbusd_epi32(high[i][g], half_bytes[i], by_high);
        low[i][g] = _mm512_dpbusd_epi32(low[i][g], half_bytes[i], by_low);
      }
    }
  };
#pragma GCC unroll 8
  for (int first = 0; first < N / 2; first += 4) {
    const __m512i bytes[2] = {_mm512_loadu_si512(run + 16 * first),
                              _mm512_loadu_si512(run + run_stride + 16 * first)};
    __m512i half_bytes[2];
    for (int i = 0; i < 2; ++i) half_bytes[i] = _mm512_and_si512(bytes[i], low_half);
    add(half_bytes, first);
    for (int i = 0; i < 2; ++i) {
      half_bytes[i] = _mm512_and_si512(_mm512_srli_epi16(bytes[i], 4), low_half);
    }
    add(half_bytes, N / 2 + first);
  }
  for (int i = 0; i < 2; ++i) {
    for (int g = 0; g < G; ++g) {
      const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high[i][g], 8), low[i][g]);
      sums[i][g][0] = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(factors[g].scale));
    }
  }
}
#else
template <int G, int N>
inline void q4_dot(const std::uint8_t* run, std::int64_t run_stride, const Q4Factors<N>* factors,
                   simd::Vec (*sums)[G][kQ4Vecs]) {
  for (int i = 0; i < 2; ++i, run += run_stride) {
    for (int g = 0; g < G; ++g) {
      float lanes[kQ4Lanes];
      for (int lane = 0; lane < kQ4Lanes; ++lane) {
        std::int32_t sum = factors[g].start;
        for (int j = 0; j < N / 2; ++j) {
          const int byte = run[j / 4 * 64 + lane * 4 + j % 4];
          const int other = N / 2 + j;
          sum += (byte & 15) * (factors[g].high[j] * 256 + factors[g].low[j]);
          sum += (byte >> 4) * (factors[g].high[other] * 256 + factors[g].low[other]);
        }
        lanes[lane] = static_cast<float>(sum) * factors[g].scale;
      }
      for (int v = 0; v < kQ4Vecs; ++v) sums[i][g][v] = simd::load(lanes + v * simd::kLanes);
    }
  }
}
#endif

}  // namespace modularbase::kernels
