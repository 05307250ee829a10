#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "modularbase/kernels/dot_factors.h"
#include "modularbase/kernels/kv_tile_q4.h"

namespace modularbase::kernels {

inline constexpr int kQ4Vecs = kQ4Lanes / simd::kLanes;

/// What the 16 lanes' numbers of two runs times the factors of G heads add up to.
#ifdef MODULARBASE_VNNI
template <int G>
class Q4Dot {
 public:
  Q4Dot() {
    for (int i = 0; i < 2; ++i) {
      for (int g = 0; g < G; ++g) high_[i][g] = low_[i][g] = _mm512_setzero_si512();
    }
  }

  /// Two runs of N numbers a lane that begin run_stride bytes apart.
  template <int N>
  [[gnu::always_inline]] void add(const std::uint8_t* run, std::int64_t run_stride,
                                  const DotFactors<N>* factors) {
    // Kept from leaving the caller's loop: there are far more factors than registers.
    asm volatile("" : "+r"(factors));
    const __m512i low_half = _mm512_set1_epi8(15);
#pragma GCC unroll 8
    for (int first = 0; first < N / 2; first += 4) {
      const __m512i bytes[2] = {_mm512_loadu_si512(run + 16 * first),
                                _mm512_loadu_si512(run + run_stride + 16 * first)};
      __m512i half_bytes[2];
      for (int i = 0; i < 2; ++i) half_bytes[i] = _mm512_and_si512(bytes[i], low_half);
      add_four(half_bytes, factors, first);
      for (int i = 0; i < 2; ++i) {
        half_bytes[i] = _mm512_and_si512(_mm512_srli_epi16(bytes[i], 4), low_half);
      }
      add_four(half_bytes, factors, N / 2 + first);
    }
  }

  /// Takes the half-bytes' offset off, given what each head's factors add up to.
  void take_offset(const std::int32_t* factor_sums) {
    for (int g = 0; g < G; ++g) {
      const __m512i offset = _mm512_set1_epi32(kQ4Offset * factor_sums[g]);
      for (int i = 0; i < 2; ++i) low_[i][g] = _mm512_sub_epi32(low_[i][g], offset);
    }
  }

  /// The sums of run i and head g.
  void lanes(int i, int g, simd::Vec* sums) const {
    sums[0] = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high_[i][g], 8), low_[i][g]));
  }

 private:
  template <int N>
  [[gnu::always_inline]] void add_four(const __m512i* half_bytes, const DotFactors<N>* factors,
                                       int first) {
    for (int g = 0; g < G; ++g) {
      std::int32_t four[2];
      std::memcpy(&four[0], factors[g].high + first, sizeof(four[0]));
      std::memcpy(&four[1], factors[g].low + first, sizeof(four[1]));
      const __m512i by_high = _mm512_set1_epi32(four[0]);
      const __m512i by_low = _mm512_set1_epi32(four[1]);
      for (int i = 0; i < 2; ++i) {
        high_[i][g] = _mm512_dpbusd_epi32(high_[i][g], half_bytes[i], by_high);
        low_[i][g] = _mm512_dpbusd_epi32(low_[i][g], half_bytes[i], by_low);
      }
    }
  }

  __m512i high_[2][G];
  __m512i low_[2][G];
};
#else
template <int G>
class Q4Dot {
 public:
  template <int N>
  void add(const std::uint8_t* run, std::int64_t run_stride, const DotFactors<N>* factors) {
    for (int i = 0; i < 2; ++i, run += run_stride) {
      for (int g = 0; g < G; ++g) {
        for (int lane = 0; lane < kQ4Lanes; ++lane) {
          std::int32_t sum = 0;
          for (int j = 0; j < N / 2; ++j) {
            const int byte = run[j / 4 * 64 + lane * 4 + j % 4];
            const int other = N / 2 + j;
            sum += (byte & 15) * (factors[g].high[j] * 256 + factors[g].low[j]);
            sum += (byte >> 4) * (factors[g].high[other] * 256 + factors[g].low[other]);
          }
          sums_[i][g][lane] += sum;
        }
      }
    }
  }

  void take_offset(const std::int32_t* factor_sums) {
    for (auto& run : sums_) {
      for (int g = 0; g < G; ++g) {
        for (std::int32_t& sum : run[g]) sum -= kQ4Offset * factor_sums[g];
      }
    }
  }

  void lanes(int i, int g, simd::Vec* sums) const {
    float numbers[kQ4Lanes];
    std::copy_n(sums_[i][g], kQ4Lanes, numbers);
    for (int v = 0; v < kQ4Vecs; ++v) sums[v] = simd::load(numbers + v * simd::kLanes);
  }

 private:
  std::int32_t sums_[2][G][kQ4Lanes] = {};
};
#endif

}  // namespace modularbase::kernels
