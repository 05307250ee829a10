#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

// See simd.h.
namespace modularbase::kernels::simd {

using Vec = __m256;
inline constexpr int kLanes = 8;

inline __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline Vec zero() {
  return _mm256_setzero_ps();
}
inline Vec set1(float value) {
  return _mm256_set1_ps(value);
}
inline Vec load(const float* p) {
  return _mm256_loadu_ps(p);
}
inline Vec load_first(const float* p, int n) {
  return _mm256_maskload_ps(p, first_lanes(n));
}
inline void store(float* p, Vec v) {
  _mm256_storeu_ps(p, v);
}
inline void store_first(float* p, int n, Vec v) {
  _mm256_maskstore_ps(p, first_lanes(n), v);
}

/// AVX2 has no masked load of 16-bit values: the tail goes through a zeroed copy.
inline __m128i load_bits_first(const std::uint16_t* p, int n) {
  alignas(16) std::uint16_t bits[8] = {};
  std::memcpy(bits, p, static_cast<std::size_t>(n) * sizeof(bits[0]));
  return _mm_load_si128(reinterpret_cast<const __m128i*>(bits));
}
inline __m128i load_bits(const std::uint16_t* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}
inline Vec widen_bf16(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline Vec load_f16(const std::uint16_t* p) {
  return _mm256_cvtph_ps(load_bits(p));
}
inline Vec load_f16_first(const std::uint16_t* p, int n) {
  return _mm256_cvtph_ps(load_bits_first(p, n));
}
inline Vec load_bf16(const std::uint16_t* p) {
  return widen_bf16(load_bits(p));
}
inline Vec load_bf16_first(const std::uint16_t* p, int n) {
  return widen_bf16(load_bits_first(p, n));
}

/// Signed bytes as floats.
inline Vec load_s8(const std::int8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}
/// One F16 number in all lanes.
inline Vec set1_f16(std::uint16_t bits) {
  return _mm256_cvtph_ps(_mm_set1_epi16(static_cast<short>(bits)));
}
/// v in the lanes whose bit is set, otherwise in the others.
inline Vec select(std::uint64_t bits, Vec v, Vec otherwise) {
  const __m256i lane_bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane_bits);
  return _mm256_blendv_ps(otherwise, v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane_bits)));
}

inline Vec fma(Vec a, Vec b, Vec c) {
  return _mm256_fmadd_ps(a, b, c);
}
inline Vec min(Vec a, Vec b) {
  return _mm256_min_ps(a, b);
}
inline Vec max(Vec a, Vec b) {
  return _mm256_max_ps(a, b);
}
inline Vec round(Vec v) {
  return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Vec scale_by_pow2(Vec v, Vec n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return v * _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}

inline float max_lanes(Vec v) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

/// out[i] = sum of the lanes of v[i]. The same tree for each of the four, so that equal vectors
/// give equal sums.
inline void sum_lanes4(Vec v0, Vec v1, Vec v2, Vec v3, float* out) {
  const Vec s01 = _mm256_unpacklo_ps(v0, v1) + _mm256_unpackhi_ps(v0, v1);
  const Vec s23 = _mm256_unpacklo_ps(v2, v3) + _mm256_unpackhi_ps(v2, v3);
  const __m256d d01 = _mm256_castps_pd(s01);
  const __m256d d23 = _mm256_castps_pd(s23);
  const Vec s = _mm256_castpd_ps(_mm256_unpacklo_pd(d01, d23)) +
                _mm256_castpd_ps(_mm256_unpackhi_pd(d01, d23));
  _mm_storeu_ps(out, _mm256_castps256_ps128(s) + _mm256_extractf128_ps(s, 1));
}
/// out[i] = the largest lane of v[i].
inline void max_lanes4(Vec v0, Vec v1, Vec v2, Vec v3, float* out) {
  out[0] = max_lanes(v0);
  out[1] = max_lanes(v1);
  out[2] = max_lanes(v2);
  out[3] = max_lanes(v3);
}

}  // namespace modularbase::kernels::simd
