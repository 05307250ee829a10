#pragma once

// GCC 12 takes the undefined registers inside its own intrinsics for mistakes of ours.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cstdint>

// See simd.h.
namespace modularbase::kernels::simd {

using Vec = __m512;
inline constexpr int kLanes = 16;

inline __mmask16 first_lanes(int n) {
  return static_cast<__mmask16>((1u << n) - 1u);
}

inline Vec zero() {
  return _mm512_setzero_ps();
}
inline Vec set1(float value) {
  return _mm512_set1_ps(value);
}
inline Vec load(const float* p) {
  return _mm512_loadu_ps(p);
}
inline Vec load_first(const float* p, int n) {
  return _mm512_maskz_loadu_ps(first_lanes(n), p);
}
inline void store(float* p, Vec v) {
  _mm512_storeu_ps(p, v);
}
inline void store_first(float* p, int n, Vec v) {
  _mm512_mask_storeu_ps(p, first_lanes(n), v);
}

inline Vec widen_bf16(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline Vec load_f16(const std::uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec load_f16_first(const std::uint16_t* p, int n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
inline Vec load_bf16(const std::uint16_t* p) {
  return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec load_bf16_first(const std::uint16_t* p, int n) {
  return widen_bf16(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}

/// Signed bytes as floats.
inline Vec load_s8(const std::int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
/// One F16 number in all lanes.
inline Vec set1_f16(std::uint16_t bits) {
  return _mm512_cvtph_ps(_mm256_set1_epi16(static_cast<short>(bits)));
}
/// v in the lanes whose bit is set, otherwise in the others.
inline Vec select(std::uint64_t bits, Vec v, Vec otherwise) {
  return _mm512_mask_blend_ps(static_cast<__mmask16>(bits), otherwise, v);
}

inline Vec fma(Vec a, Vec b, Vec c) {
  return _mm512_fmadd_ps(a, b, c);
}
inline Vec min(Vec a, Vec b) {
  return _mm512_min_ps(a, b);
}
inline Vec max(Vec a, Vec b) {
  return _mm512_max_ps(a, b);
}
inline Vec round(Vec v) {
  return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Vec scale_by_pow2(Vec v, Vec n) {
  return _mm512_scalef_ps(v, n);
}

inline float max_lanes(Vec v) {
  return _mm512_reduce_max_ps(v);
}

/// out[i] = sum of the lanes of v[i]. The same tree for each of the four, so that equal vectors
/// give equal sums.
inline void sum_lanes4(Vec v0, Vec v1, Vec v2, Vec v3, float* out) {
  const Vec s01 = _mm512_unpacklo_ps(v0, v1) + _mm512_unpackhi_ps(v0, v1);
  const Vec s23 = _mm512_unpacklo_ps(v2, v3) + _mm512_unpackhi_ps(v2, v3);
  const __m512d d01 = _mm512_castps_pd(s01);
  const __m512d d23 = _mm512_castps_pd(s23);
  const Vec s = _mm512_castpd_ps(_mm512_unpacklo_pd(d01, d23)) +
                _mm512_castpd_ps(_mm512_unpackhi_pd(d01, d23));
  const __m256 half = _mm512_castps512_ps256(s) + _mm512_extractf32x8_ps(s, 1);
  _mm_storeu_ps(out, _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
}
/// out[i] = the largest lane of v[i].
inline void max_lanes4(Vec v0, Vec v1, Vec v2, Vec v3, float* out) {
  const Vec m01 = max(_mm512_unpacklo_ps(v0, v1), _mm512_unpackhi_ps(v0, v1));
  const Vec m23 = max(_mm512_unpacklo_ps(v2, v3), _mm512_unpackhi_ps(v2, v3));
  const __m512d d01 = _mm512_castps_pd(m01);
  const __m512d d23 = _mm512_castps_pd(m23);
  const Vec m = max(_mm512_castpd_ps(_mm512_unpacklo_pd(d01, d23)),
                    _mm512_castpd_ps(_mm512_unpackhi_pd(d01, d23)));
  const __m256 half = _mm256_max_ps(_mm512_castps512_ps256(m), _mm512_extractf32x8_ps(m, 1));
  _mm_storeu_ps(out, _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

}  // namespace modularbase::kernels::simd
