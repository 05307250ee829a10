#pragma once

#include <cstdint>
#include <cstring>

#include "modularbase/kernels/kv_tile_q4.h"
#include "modularbase/kernels/simd.h"

namespace modularbase::kernels {

inline constexpr int kQ4Vecs = kQ4Lanes / simd::kLanes;

/// What N half-bytes are multiplied with, rounded to 16 bits of the largest: number i is scale
/// times (256 high[i] + low[i]).
template <int N>
struct alignas(64) Q4Factors {
  std::int8_t high[N];
  std::int8_t low[N];
  std::int32_t start;  // takes the half-bytes' offset off: -kQ4Offset times the integers' sum
  float scale;
};

template <int N>
[[gnu::always_inline]] inline void round_factors(const float* x, Q4Factors<N>& factors) {
  using Ints = std::int32_t __attribute__((vector_size(sizeof(simd::Vec))));
  using Bytes = std::int8_t __attribute__((vector_size(simd::kLanes)));
  constexpr float kLargest = 127 * 256;  // the high half of more would be rounded up to 128
  constexpr int kVecs = N / simd::kLanes;
  simd::Vec largest = simd::zero();
  for (int i = 0; i < kVecs; ++i) {
    const simd::Vec v = simd::load(x + i * simd::kLanes);
    largest = simd::max(largest, simd::max(v, simd::zero() - v));
  }
  const float max = simd::max_lanes(largest);
  const bool is_zero = max < 1e-30f;  // weights so small count for nothing; 1 / max stays finite
  const simd::Vec inverse = simd::set1(is_zero ? 0.0f : kLargest / max);
  simd::Vec sums[4] = {simd::zero(), simd::zero(), simd::zero(), simd::zero()};
  for (int i = 0; i < kVecs; ++i) {
    const simd::Vec rounded = simd::round(simd::load(x + i * simd::kLanes) * inverse);
    sums[i % 4] = sums[i % 4] + rounded;
    const Ints whole = __builtin_convertvector(rounded, Ints);
    const Ints high = (whole + 128) >> 8;
    const Bytes bytes[2] = {__builtin_convertvector(high, Bytes),
                            __builtin_convertvector(whole - high * 256, Bytes)};
    std::memcpy(factors.high + i * simd::kLanes, &bytes[0], sizeof(Bytes));
    std::memcpy(factors.low + i * simd::kLanes, &bytes[1], sizeof(Bytes));
  }
  float sum[4];
  simd::sum_lanes4(sums[0], sums[1], sums[2], sums[3], sum);  // whole numbers below 2^24: exact
  factors.start = -kQ4Offset * static_cast<std::int32_t>(sum[0] + sum[1] + (sum[2] + sum[3]));
  factors.scale = is_zero ? 0.0f : max / kLargest;
}

/// sums[i][g] = what the 16 lanes' half-bytes times factors[g] add up to, for two runs of N numbers
/// a lane that begin run_stride bytes apart.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
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
