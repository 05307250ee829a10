#pragma once

#include <cstdint>
#include <cstring>

#include "modularbase/kernels/attention_rows.h"
#include "modularbase/kernels/dot_factors.h"
#include "modularbase/kernels/rounded_queries.h"

namespace modularbase::kernels {

#if defined(MODULARBASE_VNNI) && defined(__AVX512VBMI__)
// Integer dot products. The rows keep ggml's order, so what is summed is brought together here,
// once for all heads.
#define MODULARBASE_Q8_DOT 1
inline constexpr std::int32_t kQ8Offset = 128;  // makes signed bytes unsigned ones

/// The scales of a tile's rows, F16 [kBlockTokens, head_dim / 32].
struct Q8Scales {
  alignas(64) std::uint16_t of[kMaxGroups][kBlockTokens];

  void load(const std::byte* tile, std::int64_t head_dim) {
    const std::int64_t n_groups = head_dim / kRoundedGroup;
    for (int token = 0; token < kBlockTokens; ++token) {
      for (std::int64_t group = 0; group < n_groups; ++group, tile += Q8_0Rows::kGroupBytes) {
        std::memcpy(&of[group][token], tile, sizeof(of[group][token]));
      }
    }
  }
};

/// The 32 bytes behind two scales, offset.
inline __m512i load_two(const std::byte* first, const std::byte* second) {
  const auto load = [](const std::byte* group) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(group + 2));
  };
  const __m512i bytes = _mm512_inserti64x4(_mm512_castsi256_si512(load(first)), load(second), 1);
  return _mm512_xor_si512(bytes, _mm512_set1_epi8(static_cast<char>(kQ8Offset)));
}

/// out[i] = numbers 4 i .. 4 i + 3 of a group in each of 16 rows: eight vectors.
[[gnu::always_inline]] inline void load_columns(const std::byte* group, std::int64_t row_bytes,
                                                __m512i* out) {
  __m512i quarters[2]
                  [4];  // [k]: number 4 k in the even lanes of 16 bytes, 16 + 4 k in the odd ones
  for (int half = 0; half < 2; ++half) {
    __m512i rows[4];
    for (int i = 0; i < 4; ++i) {
      const std::byte* first = group + (8 * half + i) * row_bytes;
      rows[i] = load_two(first, first + 4 * row_bytes);
    }
    const __m512i low01 = _mm512_unpacklo_epi32(rows[0], rows[1]);
    const __m512i high01 = _mm512_unpackhi_epi32(rows[0], rows[1]);
    const __m512i low23 = _mm512_unpacklo_epi32(rows[2], rows[3]);
    const __m512i high23 = _mm512_unpackhi_epi32(rows[2], rows[3]);
    quarters[half][0] = _mm512_unpacklo_epi64(low01, low23);
    quarters[half][1] = _mm512_unpackhi_epi64(low01, low23);
    quarters[half][2] = _mm512_unpacklo_epi64(high01, high23);
    quarters[half][3] = _mm512_unpackhi_epi64(high01, high23);
  }
  for (int k = 0; k < 4; ++k) {
    out[k] = _mm512_shuffle_i32x4(quarters[0][k], quarters[1][k], 0x88);
    out[4 + k] = _mm512_shuffle_i32x4(quarters[0][k], quarters[1][k], 0xdd);
  }
}

/// Adds up bytes times factors, four in each lane.
struct Q8Sum {
  __m512i high = _mm512_setzero_si512();
  __m512i low = _mm512_setzero_si512();

  template <int N>
  [[gnu::always_inline]] void add(__m512i bytes, const DotFactors<N>& factors, int first) {
    std::int32_t four[2];
    std::memcpy(&four[0], factors.high + first, sizeof(four[0]));
    std::memcpy(&four[1], factors.low + first, sizeof(four[1]));
    high = _mm512_dpbusd_epi32(high, bytes, _mm512_set1_epi32(four[0]));
    low = _mm512_dpbusd_epi32(low, bytes, _mm512_set1_epi32(four[1]));
  }
  void take_offset(std::int32_t factor_sum) {
    low = _mm512_sub_epi32(low, _mm512_set1_epi32(kQ8Offset * factor_sum));
  }
  simd::Vec lanes() const {
    return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
  }
};

/// The bytes of 16 dims of a group in four rows, dim by dim.
inline __m512i interleave(__m512i rows01, __m512i rows23, int first_dim) {
  const __m512i dims = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i four_times = _mm512_mullo_epi32(
      _mm512_add_epi32(dims, _mm512_set1_epi32(first_dim)), _mm512_set1_epi32(0x01010101));
  const __m512i order = _mm512_add_epi32(four_times, _mm512_set1_epi32(0x60402000));
  return _mm512_permutex2var_epi8(rows01, order, rows23);
}
#endif

}  // namespace modularbase::kernels
