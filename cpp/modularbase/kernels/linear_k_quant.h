#pragma once

#include "modularbase/kernels/linear_quantised.h"

#if defined(MODULARBASE_LINEAR_QUANTISED)

namespace modularbase::kernels {

/// Q4_K, 256 weights in 144 bytes: F16 d and dmin, 8 scales and 8 mins of 6 bits, and nibbles; of
/// 32 bytes the low nibbles are one block of 32, the high ones the next. w = d * scale * q - dmin *
/// min.
struct Q4_KWeights {
  using Elem = std::uint8_t;
  using XElem = QuantisedX;
  using XLane = const QuantisedX*;
  static constexpr int kBlockBytes = 144;
  static constexpr int kStep = 256;
  static constexpr int kStepElems = kBlockBytes;
  static constexpr int kPairs = kStep / (2 * kQuantBlock);
  static constexpr int kXStepElems = kPairs;
  struct Lane {
    __m512i q[kPairs];
    __m512 scale[kPairs];
    __m512 min[kPairs];  // negative
  };

  static std::int64_t row_elems(std::int64_t n_in) { return n_in / kStep * kBlockBytes; }
  static Lane load(const Elem* p) {
    const __m512 factors = block_factors(p);
    Lane lane;
    for_pair<0>(lane, factors, p);
    for_pair<1>(lane, factors, p);
    for_pair<2>(lane, factors, p);
    for_pair<3>(lane, factors, p);
    return lane;
  }
  static Lane load_first(const Elem* p, int /*n*/) { return load(p); }
  static XLane load_x(const XElem* x) { return x; }
  static void pack_x(const float* src, XElem* dst) {
    for (int i = 0; i < kPairs; ++i) Q4_1Weights::pack_x(src + 64 * i, dst + i);
  }
  static void pack_x(const float* src, int /*n*/, XElem* dst) { pack_x(src, dst); }
  static simd::Vec multiply_add(const Lane& w, XLane x, simd::Vec sum) {
    for (int i = 0; i < kPairs; ++i) {
      const Q4_1Weights::Lane pair{w.q[i], w.scale[i], w.min[i]};
      sum = Q4_1Weights::multiply_add(pair, Q4_1Weights::load_x(x + i), sum);
    }
    return sum;
  }

 private:
  /// d * scale of the 8 blocks, then -dmin * min.
  static __m512 block_factors(const Elem* p) {
    std::uint32_t packed[3];  // see ggml's get_scale_min_k4: 4 + 2 bits of the last four lie apart
    std::memcpy(packed, p + 4, sizeof(packed));
    constexpr std::uint32_t kSix = 0x3f3f3f3f, kFour = 0x0f0f0f0f, kTwo = 0x03030303;
    const std::uint32_t scales_low = packed[0] & kSix, mins_low = packed[1] & kSix;
    const std::uint32_t scales_high = (packed[2] & kFour) | ((packed[0] >> 6 & kTwo) << 4);
    const std::uint32_t mins_high = (packed[2] >> 4 & kFour) | ((packed[1] >> 6 & kTwo) << 4);
    const __m128i bytes =
        _mm_setr_epi32(std::bit_cast<int>(scales_low), std::bit_cast<int>(scales_high),
                       std::bit_cast<int>(mins_low), std::bit_cast<int>(mins_high));
    std::int32_t head;
    std::memcpy(&head, p, sizeof(head));
    const __m128 d = _mm_cvtph_ps(_mm_cvtsi32_si128(head));  // d, dmin
    const __m512 both =
        _mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1),
                              _mm512_castps128_ps512(d));
    const __m512 factors = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)), both);
    return _mm512_mask_sub_ps(factors, 0xff00, _mm512_setzero_ps(), factors);
  }

  /// Number i of the factors in the lanes of QuantisedX's first block, i + 1 in the second's.
  template <int i>
  static __m512 spread(__m512 factors) {
    constexpr int j = i + 1;
    return _mm512_permutexvar_ps(_mm512_setr_epi32(i, i, i, i, j, j, j, j, i, i, i, i, j, j, j, j),
                                 factors);
  }

  template <int i>
  static void for_pair(Lane& lane, __m512 factors, const Elem* p) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16 + 32 * i));
    const __m512i wide =
        _mm512_inserti64x4(_mm512_castsi256_si512(bytes), _mm256_srli_epi16(bytes, 4), 1);
    const __m512i in_order = _mm512_and_si512(wide, _mm512_set1_epi8(15));
    // Into QuantisedX's order: the low halves of both blocks come first.
    lane.q[i] = _mm512_shuffle_i64x2(in_order, in_order, _MM_SHUFFLE(3, 1, 2, 0));
    lane.scale[i] = spread<2 * i>(factors);
    lane.min[i] = spread<8 + 2 * i>(factors);
  }
};

}  // namespace modularbase::kernels
#endif
