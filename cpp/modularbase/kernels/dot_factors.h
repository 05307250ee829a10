#pragma once

#include <cstdint>
#include <cstring>

#include "modularbase/kernels/kv_tile.h"
#include "modularbase/kernels/simd.h"

namespace modularbase::kernels {

/// What N small whole numbers are multiplied with in integer dot products: whole numbers of 16
/// bits, 256 high[i] + low[i].
template <int N>
struct alignas(64) DotFactors {
  std::int8_t high[N];
  std::int8_t low[N];
};

inline constexpr float kLargestFactor = 127 * 256;  // the high half of more would be 128

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define MODULARBASE_VNNI 1
/// What factors add up to: takes an offset off that all numbers they are multiplied with have.
class FactorSum {
 public:
  void add(__m512i high, __m512i low) {
    const __m512i ones = _mm512_set1_epi8(1);
    high_ = _mm512_dpbusd_epi32(high_, ones, high);
    low_ = _mm512_dpbusd_epi32(low_, ones, low);
  }
  std::int32_t total() const { return _mm512_reduce_add_epi32(lanes()); }
  /// Numbers that add up to the total.
  simd::Vec parts() const { return _mm512_cvtepi32_ps(lanes()); }

 private:
  __m512i lanes() const { return _mm512_add_epi32(_mm512_slli_epi32(high_, 8), low_); }

  __m512i high_ = _mm512_setzero_si512();
  __m512i low_ = _mm512_setzero_si512();
};

/// Rounds numbers to factors; N is 32 or 64.
template <int N>
[[gnu::always_inline]] inline void round_factors(const simd::Vec* numbers, DotFactors<N>& factors,
                                                 FactorSum& sum) {
  __m512i high_words[2], low_words[2];
  for (int i = 0; i < 2; ++i) {
    const simd::Vec* two = numbers + (N == 64 ? 2 * i : 0);
    const __m512i words =
        _mm512_packs_epi32(_mm512_cvtps_epi32(two[0]), _mm512_cvtps_epi32(two[1]));
    high_words[i] = _mm512_srai_epi16(_mm512_add_epi16(words, _mm512_set1_epi16(128)), 8);
    low_words[i] = _mm512_and_si512(words, _mm512_set1_epi16(255));
  }
  // Packing works within 16 bytes: four numbers of each vector lie together, in this order.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  constexpr __mmask16 kUsed = N == 64 ? 0xffff : 0x00ff;
  const __m512i high = _mm512_maskz_permutexvar_epi32(
      kUsed, order, _mm512_packs_epi16(high_words[0], high_words[1]));
  const __m512i low =
      _mm512_maskz_permutexvar_epi32(kUsed, order, _mm512_packus_epi16(low_words[0], low_words[1]));
  _mm512_mask_storeu_epi32(factors.high, kUsed, high);
  _mm512_mask_storeu_epi32(factors.low, kUsed, low);
  sum.add(high, low);
}
#else
class FactorSum {
 public:
  void add(std::int32_t factor) { total_ += factor; }
  std::int32_t total() const { return total_; }
  simd::Vec parts() const {
    const auto total = static_cast<float>(total_);
    return simd::load_first(&total, 1);
  }

 private:
  std::int32_t total_ = 0;
};

template <int N>
inline void round_factors(const simd::Vec* numbers, DotFactors<N>& factors, FactorSum& sum) {
  for (int i = 0; i < N; ++i) {
    const simd::Vec rounded = simd::round(numbers[i / simd::kLanes]);
    const auto whole = static_cast<std::int32_t>(rounded[i % simd::kLanes]);
    factors.high[i] = static_cast<std::int8_t>((whole + 128) >> 8);
    factors.low[i] = static_cast<std::int8_t>(whole - factors.high[i] * 256);
    sum.add(whole);
  }
}
#endif

}  // namespace modularbase::kernels
