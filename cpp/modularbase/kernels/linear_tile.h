#pragma once

#include <cstdint>

#include "modularbase/kernels/simd.h"

/// The inner product of a few weight rows with a few rows of x, for each weight type. The lanes run along n_in, one
/// accumulator an element, so an element is summed in the same order in a tile of any shape.
namespace modularbase::kernels {

struct F32Weights {
  using Elem = float;
  using XElem = float;  // what a packed row of x holds
  using Lane = simd::Vec;
  static constexpr int kStep = simd::kLanes;  // elements of n_in in one vector
  static Lane load(const Elem* p) { return simd::load(p); }
  static Lane load_first(const Elem* p, int n) { return simd::load_first(p, n); }
  static Lane load_x(const XElem* p) { return simd::load(p); }
  static void pack_x(const float* src, int n, XElem* dst) { simd::store(dst, simd::load_first(src, n)); }
  static void pack_x(const float* src, XElem* dst) { simd::store(dst, simd::load(src)); }
  static simd::Vec multiply_add(Lane w, Lane x, simd::Vec sum) { return simd::fma(w, x, sum); }
};

struct F16Weights : F32Weights {
  using Elem = std::uint16_t;
  static Lane load(const Elem* p) { return simd::load_f16(p); }
  static Lane load_first(const Elem* p, int n) { return simd::load_f16_first(p, n); }
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
/// x is rounded to BF16 (nearest even); products are exact and summed in F32, two a lane and step.
struct Bf16Weights {
  using Elem = std::uint16_t;
  using XElem = std::uint16_t;
  using Lane = __m512bh;
  static constexpr int kStep = 32;
  static __mmask32 first(int n) { return static_cast<__mmask32>((std::uint64_t{1} << n) - 1); }
  static Lane load(const Elem* p) { return (Lane)_mm512_loadu_si512(p); }
  static Lane load_first(const Elem* p, int n) { return (Lane)_mm512_maskz_loadu_epi16(first(n), p); }
  static Lane load_x(const XElem* p) { return (Lane)_mm512_load_si512(p); }
  static void pack_x(const float* src, int n, XElem* dst) {
    const __m512 low = simd::load_first(src, n < 16 ? n : 16);
    const __m512 high = n > 16 ? simd::load_first(src + 16, n - 16) : simd::zero();
    _mm512_store_si512(dst, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
  static void pack_x(const float* src, XElem* dst) { pack_x(src, kStep, dst); }
  static simd::Vec multiply_add(Lane w, Lane x, simd::Vec sum) { return _mm512_dpbf16_ps(sum, w, x); }
};
#else
struct Bf16Weights : F32Weights {
  using Elem = std::uint16_t;
  static Lane load(const Elem* p) { return simd::load_bf16(p); }
  static Lane load_first(const Elem* p, int n) { return simd::load_bf16_first(p, n); }
};
#endif

/// Prefetching runs one tile ahead; beyond the weights it is harmless.
template <class T, int kWRows, int kXRows, bool kPrefetch>
void dot_tile(const typename T::Elem* w,   // [n_in, n_w]
              int n_w,                     // 1..kWRows
              const typename T::XElem* x,  // [kStep, kXRows, steps], zero beyond n_in
              std::int64_t n_in,
              float* out,  // [kWRows, kXRows], rows out_stride apart; columns from n_w on get some value
              std::int64_t out_stride) {
  static_assert(kWRows % 4 == 0);
  const typename T::Elem* rows[kWRows];
  for (int i = 0; i < kWRows; ++i) rows[i] = w + (i < n_w ? i : n_w - 1) * n_in;
  simd::Vec sums[kXRows][kWRows];
#pragma GCC unroll 8
  for (int j = 0; j < kXRows; ++j) {
#pragma GCC unroll 8
    for (int i = 0; i < kWRows; ++i) sums[j][i] = simd::zero();
  }
  const auto step = [&](auto load_w) {
    typename T::Lane lanes[kXRows];
#pragma GCC unroll 8
    for (int j = 0; j < kXRows; ++j) lanes[j] = T::load_x(x + j * T::kStep);
#pragma GCC unroll 8
    for (int i = 0; i < kWRows; ++i) {
      const typename T::Lane weight = load_w(rows[i]);
#pragma GCC unroll 8
      for (int j = 0; j < kXRows; ++j) sums[j][i] = T::multiply_add(weight, lanes[j], sums[j][i]);
    }
    x += kXRows * T::kStep;
  };
  const std::int64_t n_whole = n_in - n_in % T::kStep;
  std::int64_t k = 0;
  for (; k < n_whole; k += T::kStep) {
    step([&](const typename T::Elem* row) {
      if constexpr (kPrefetch) __builtin_prefetch(row + k + kWRows * n_in);
      return T::load(row + k);
    });
  }
  if (k < n_in) {
    step([&](const typename T::Elem* row) { return T::load_first(row + k, static_cast<int>(n_in - k)); });
  }
#pragma GCC unroll 8
  for (int j = 0; j < kXRows; ++j) {
#pragma GCC unroll 8
    for (int i = 0; i < kWRows; i += 4) {
      simd::sum_lanes4(sums[j][i], sums[j][i + 1], sums[j][i + 2], sums[j][i + 3], out + j * out_stride + i);
    }
  }
}

}  // namespace modularbase::kernels
