#pragma once

#include <cstdint>
#include <cstring>

#include "modularbase/kernels/kv_tile_q4.h"
#include "modularbase/kernels/simd.h"

namespace modularbase::kernels {

/// What N half-bytes are multiplied with, rounded to 16 bits of the largest: number i is scale
/// times (256 high[i] + low[i]).
template <int N>
struct alignas(64) Q4Factors {
  std::int8_t high[N];
  std::int8_t low[N];
  std::int32_t start;  // takes the half-bytes' offset off: -kQ4Offset times the integers' sum
  float scale;
};

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define MODULARBASE_Q4_VNNI 1
// Writes whole numbers as two bytes each; returns their sum.
template <int N>
inline std::int32_t split_bytes(const simd::Vec* numbers, std::int8_t* high, std::int8_t* low) {
  __m512i high_words[2], low_words[2];
  for (int i = 0; i < 2; ++i) {
    const simd::Vec* two = numbers + (N == kBlockTokens ? 2 * i : 0);
    const __m512i words =
        _mm512_packs_epi32(_mm512_cvtps_epi32(two[0]), _mm512_cvtps_epi32(two[1]));
    high_words[i] = _mm512_srai_epi16(_mm512_add_epi16(words, _mm512_set1_epi16(128)), 8);
    low_words[i] = _mm512_sub_epi16(words, _mm512_slli_epi16(high_words[i], 8));
  }
  // Packing works within 16 bytes: four numbers of each vector lie together, in this order.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  constexpr __mmask16 kUsed = N == kBlockTokens ? 0xffff : 0x00ff;
  const auto pack = [&](const __m512i* words) {
    const __m512i bytes = _mm512_packs_epi16(words[0], words[1]);
    return _mm512_maskz_permutexvar_epi32(kUsed, order, bytes);
  };
  const __m512i high_bytes = pack(high_words);
  const __m512i low_bytes = pack(low_words);
  _mm512_mask_storeu_epi32(high, kUsed, high_bytes);
  _mm512_mask_storeu_epi32(low, kUsed, low_bytes);
  const __m512i zero = _mm512_setzero_si512();
  const __m512i ones = _mm512_set1_epi8(1);
  const __m512i of_high = _mm512_dpbusd_epi32(zero, ones, high_bytes);
  return _mm512_reduce_add_epi32(
      _mm512_dpbusd_epi32(_mm512_slli_epi32(of_high, 8), ones, low_bytes));
}
#else
template <int N>
inline std::int32_t split_bytes(const simd::Vec* numbers, std::int8_t* high, std::int8_t* low) {
  std::int32_t sum = 0;
  for (int i = 0; i < N; ++i) {
    const auto whole = static_cast<std::int32_t>(numbers[i / simd::kLanes][i % simd::kLanes]);
    high[i] = static_cast<std::int8_t>((whole + 128) >> 8);
    low[i] = static_cast<std::int8_t>(whole - high[i] * 256);
    sum += whole;
  }
  return sum;
}
#endif

template <int N>
[[gnu::always_inline]] inline void round_factors(const float* x, Q4Factors<N>& factors) {
  constexpr float kLargest = 127 * 256;  // the high half of more would be rounded up to 128
  simd::Vec numbers[N / simd::kLanes];
  simd::Vec largest = simd::zero();
  for (simd::Vec& v : numbers) {
    v = simd::load(x);
    x += simd::kLanes;
    largest = simd::max(largest, simd::max(v, simd::zero() - v));
  }
  const float max = simd::max_lanes(largest);
  const bool is_zero = max < 1e-30f;  // weights so small count for nothing; 1 / max stays finite
  const simd::Vec inverse = simd::set1(is_zero ? 0.0f : kLargest / max);
  for (simd::Vec& v : numbers) v = simd::round(v * inverse);
  factors.start = -kQ4Offset * split_bytes<N>(numbers, factors.high, factors.low);
  factors.scale = is_zero ? 0.0f : max / kLargest;
}

}  // namespace modularbase::kernels
