#pragma once

#include "modularbase/kernels/simd.h"

/// Weight types for linear_tile.h whose products are summed in integers: x is rounded to 8 bits in
/// blocks of 32, as llama.cpp does, but its scale stays F32.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define MODULARBASE_LINEAR_QUANTISED 1

#include <bit>
#include <cstdint>
#include <cstring>

namespace modularbase::kernels {

inline constexpr int kQuantBlock = 32;

/// 64 elements of x: two blocks in the order of the weights' lanes. A lane of 16 bytes holds 16
/// elements of one block: low half of block 0, of block 1, then the high halves.
struct alignas(64) QuantisedX {
  std::int8_t q[64];
  float scale[16];         // of the block that each 32-bit lane belongs to
  std::int32_t start[16];  // what a block's sum starts from, in the block's first lane, else 0
};

/// Rounds a block of x to 8 bits; returns its scale.
inline float round_block(const float* src, std::int8_t* q) {
  const __m512 low = _mm512_loadu_ps(src), high = _mm512_loadu_ps(src + 16);
  const float max = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
  const __m512 inverse = _mm512_set1_ps(max > 0.0f ? 127.0f / max : 0.0f);
  const auto store = [&](__m512 v, std::int8_t* to) {
    const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(v, inverse));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(rounded));
  };
  store(low, q);
  store(high, q + 16);
  return max / 127.0f;
}

/// What the block formats of ggml have in common: an F16 scale first, then 32 weights. Format says
/// what a sum starts from when a block's q add up to `sum`.
template <class Format>
struct QuantisedWeights {
  using Elem = std::uint8_t;
  using XElem = QuantisedX;
  struct XLane {
    __m512i q;
    __m512 scale;
    __m512i start;
  };
  static constexpr int kStep = 2 * kQuantBlock;
  static constexpr int kXStepElems = 1;

  static XLane load_x(const QuantisedX* x) {
    return {_mm512_load_si512(x->q), _mm512_load_ps(x->scale), _mm512_load_si512(x->start)};
  }
  static void pack_x(const float* src, QuantisedX* dst) { pack_x(src, kStep, dst); }
  static void pack_x(const float* src, int n, QuantisedX* dst) {
    *dst = {};
    for (int block = 0; block * kQuantBlock < n; ++block) {
      pack_block(src + block * kQuantBlock, block, dst);
    }
  }

 protected:
  static __m128i load_16(const Elem* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  }
  static __m128i load_4(const Elem* p) {
    std::int32_t bits;
    std::memcpy(&bits, p, sizeof(bits));
    return _mm_cvtsi32_si128(bits);
  }
  /// The first two F16 numbers of one block, or of two: [a0, a1, b0, b1].
  static __m512 heads(const Elem* a) { return _mm512_castps128_ps512(_mm_cvtph_ps(load_4(a))); }
  static __m512 heads(const Elem* a, const Elem* b) {
    const __m128i both = _mm_unpacklo_epi32(load_4(a), load_4(b));
    return _mm512_castps128_ps512(_mm_cvtph_ps(both));
  }
  /// Number i of each block's head, in the lanes that hold the block's elements.
  template <int i>
  static __m512 spread(__m512 heads) {
    constexpr int j = i + 2;
    return _mm512_permutexvar_ps(_mm512_setr_epi32(i, i, i, i, j, j, j, j, i, i, i, i, j, j, j, j),
                                 heads);
  }
  /// Two blocks of nibbles as bytes, in the order of QuantisedX.
  static __m512i nibbles(__m128i first, __m128i second) {
    const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1);
    const __m512i wide =
        _mm512_inserti64x4(_mm512_castsi256_si512(both), _mm256_srli_epi16(both, 4), 1);
    return _mm512_and_si512(wide, _mm512_set1_epi8(15));
  }

 private:
  static void pack_block(const float* src, int block, QuantisedX* dst) {
    std::int8_t q[kQuantBlock];
    const float scale = round_block(src, q);
    std::memcpy(dst->q + 16 * block, q, 16);
    std::memcpy(dst->q + 32 + 16 * block, q + 16, 16);
    std::int32_t sum = 0;
    for (const std::int8_t value : q) sum += value;
    dst->start[4 * block] = Format::start_of(sum);
    for (int i = 0; i < 4; ++i) {
      dst->scale[4 * block + i] = scale;
      dst->scale[8 + 4 * block + i] = scale;
    }
  }
};

/// w = d * (q - kOffset), q unsigned: the offset is taken off in integers, where sums are exact.
template <class Format, int kOffset>
struct OffsetWeights : QuantisedWeights<Format> {
  struct Lane {
    __m512i q;
    __m512 scale;
  };
  using XLane = typename QuantisedWeights<Format>::XLane;

  static std::int32_t start_of(std::int32_t sum) { return -kOffset * sum; }
  static simd::Vec multiply_add(const Lane& w, const XLane& x, simd::Vec sum) {
    const __m512 dot = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(x.start, w.q, x.q));
    return _mm512_fmadd_ps(dot, _mm512_mul_ps(w.scale, x.scale), sum);
  }
};

struct Q4_0Weights : OffsetWeights<Q4_0Weights, 8> {
  static constexpr int kBlockBytes = 18;  // F16 d, 32 nibbles
  static constexpr int kStepElems = 2 * kBlockBytes;
  static std::int64_t row_elems(std::int64_t n_in) { return n_in / kQuantBlock * kBlockBytes; }
  static Lane load(const Elem* p) {
    const Elem* next = p + kBlockBytes;
    return {nibbles(load_16(p + 2), load_16(next + 2)), spread<0>(heads(p, next))};
  }
  static Lane load_first(const Elem* p, int /*n*/) {
    return {nibbles(load_16(p + 2), _mm_setzero_si128()), spread<0>(heads(p))};
  }
};

struct Q8_0Weights : OffsetWeights<Q8_0Weights, 128> {
  static constexpr int kBlockBytes = 34;  // F16 d, 32 signed bytes
  static constexpr int kStepElems = 2 * kBlockBytes;
  static std::int64_t row_elems(std::int64_t n_in) { return n_in / kQuantBlock * kBlockBytes; }
  static Lane load(const Elem* p) {
    const Elem* next = p + kBlockBytes;
    return {bytes(load_16(p + 2), load_16(next + 2), load_16(p + 18), load_16(next + 18)),
            spread<0>(heads(p, next))};
  }
  static Lane load_first(const Elem* p, int /*n*/) {
    const __m128i none = _mm_setzero_si128();
    return {bytes(load_16(p + 2), none, load_16(p + 18), none), spread<0>(heads(p))};
  }

 private:
  static __m512i bytes(__m128i a, __m128i b, __m128i c, __m128i d) {
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(c), d, 1);
    const __m512i all = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    return _mm512_xor_si512(all, _mm512_set1_epi8(static_cast<char>(0x80)));  // + 128
  }
};

/// w = d * q + m.
struct Q4_1Weights : QuantisedWeights<Q4_1Weights> {
  struct Lane {
    __m512i q;
    __m512 scale;
    __m512 min;
  };
  static constexpr int kBlockBytes = 20;  // F16 d, F16 m, 32 nibbles
  static constexpr int kStepElems = 2 * kBlockBytes;
  static std::int64_t row_elems(std::int64_t n_in) { return n_in / kQuantBlock * kBlockBytes; }
  static Lane load(const Elem* p) {
    const Elem* next = p + kBlockBytes;
    const __m512 both = heads(p, next);
    return {nibbles(load_16(p + 4), load_16(next + 4)), spread<0>(both), spread<1>(both)};
  }
  static Lane load_first(const Elem* p, int /*n*/) {
    const __m512 first = heads(p);
    return {nibbles(load_16(p + 4), _mm_setzero_si128()), spread<0>(first), spread<1>(first)};
  }
  /// As the bits of a float, which m is multiplied with.
  static std::int32_t start_of(std::int32_t sum) {
    return std::bit_cast<std::int32_t>(static_cast<float>(sum));
  }
  static simd::Vec multiply_add(const Lane& w, const XLane& x, simd::Vec sum) {
    const __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), w.q, x.q);
    const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(dot), w.scale);
    const __m512 both = _mm512_fmadd_ps(_mm512_castsi512_ps(x.start), w.min, scaled);
    return _mm512_fmadd_ps(both, x.scale, sum);
  }
};

}  // namespace modularbase::kernels
#endif
