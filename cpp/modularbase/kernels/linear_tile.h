#pragma once

#include <algorithm>
#include <cstdint>

#include "modularbase/kernels/simd.h"

/// The inner product of a few weight rows with a few rows of x, for each weight type. The lanes run
/// along n_in, one accumulator an element, so an element is summed in the same order in a tile of
/// any shape. A row is a sequence of steps: kStep weights in kStepElems Elems, and the same stretch
/// of x in kXStepElems XElems.
namespace modularbase::kernels {

struct F32Weights {
  using Elem = float;
  using XElem = float;  // what a packed row of x holds
  using Lane = simd::Vec;
  using XLane = simd::Vec;
  static constexpr int kStep = simd::kLanes;
  static constexpr int kStepElems = kStep;
  static constexpr int kXStepElems = kStep;
  static std::int64_t row_elems(std::int64_t n_in) { return n_in; }
  static Lane load(const Elem* p) { return simd::load(p); }
  static Lane load_first(const Elem* p, int n) { return simd::load_first(p, n); }
  static Lane load_x(const XElem* p) { return simd::load(p); }
  static void pack_x(const float* src, int n, XElem* dst) {
    simd::store(dst, simd::load_first(src, n));
  }
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
  using XLane = __m512bh;
  static constexpr int kStep = 32;
  static constexpr int kStepElems = kStep;
  static constexpr int kXStepElems = kStep;
  static std::int64_t row_elems(std::int64_t n_in) { return n_in; }
  static __mmask32 first(int n) { return static_cast<__mmask32>((std::uint64_t{1} << n) - 1); }
  static Lane load(const Elem* p) { return (Lane)_mm512_loadu_si512(p); }
  static Lane load_first(const Elem* p, int n) {
    return (Lane)_mm512_maskz_loadu_epi16(first(n), p);
  }
  static Lane load_x(const XElem* p) { return (Lane)_mm512_load_si512(p); }
  static void pack_x(const float* src, int n, XElem* dst) {
    const __m512 low = simd::load_first(src, n < 16 ? n : 16);
    const __m512 high = n > 16 ? simd::load_first(src + 16, n - 16) : simd::zero();
    _mm512_store_si512(dst, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
  static void pack_x(const float* src, XElem* dst) { pack_x(src, kStep, dst); }
  static simd::Vec multiply_add(Lane w, Lane x, simd::Vec sum) {
    return _mm512_dpbf16_ps(sum, w, x);
  }
};
#else
struct Bf16Weights : F32Weights {
  using Elem = std::uint16_t;
  static Lane load(const Elem* p) { return simd::load_bf16(p); }
  static Lane load_first(const Elem* p, int n) { return simd::load_bf16_first(p, n); }
};
#endif

/// One row of x: the weights only pass through, so they are read as one stream, row after row,
/// which the hardware prefetches best. Each sum is a chain, but the next row's chain overlaps it.
template <class T>
void dot_rows(const typename T::Elem* w,   // [n_in, n_w]
              int n_w,                     // 1..
              const typename T::XElem* x,  // [kXStepElems, steps], zero beyond n_in
              std::int64_t n_in, float* out) {
  const std::int64_t n_whole = n_in / T::kStep;
  const int n_last = static_cast<int>(n_in % T::kStep);
  const std::int64_t row_elems = T::row_elems(n_in);
  const auto dot = [&](const typename T::Elem* row) {
    simd::Vec sum = simd::zero();
    std::int64_t s = 0;
#pragma GCC unroll 4
    for (; s < n_whole; ++s) {
      sum =
          T::multiply_add(T::load(row + s * T::kStepElems), T::load_x(x + s * T::kXStepElems), sum);
    }
    if (n_last > 0) {
      sum = T::multiply_add(T::load_first(row + s * T::kStepElems, n_last),
                            T::load_x(x + s * T::kXStepElems), sum);
    }
    return sum;
  };
  for (int i = 0; i < n_w; i += 4) {
    const auto row = [&](int j) { return w + std::min(i + j, n_w - 1) * row_elems; };
    const simd::Vec s0 = dot(row(0)), s1 = dot(row(1)), s2 = dot(row(2)), s3 = dot(row(3));
    simd::sum_lanes4(s0, s1, s2, s3, out + i);
  }
}

/// out[j * out_stride + i] = sum of the lanes of sums[j][i], four at a time by the same tree; i <
/// n_w, but where 4 divides kWRows there is room for all.
template <int kWRows, int kXRows>
inline void store_sums(const simd::Vec (&sums)[kXRows][kWRows], [[maybe_unused]] int n_w,
                       float* out, std::int64_t out_stride) {
  if constexpr (kWRows % 4 == 0) {
#pragma GCC unroll 8
    for (int j = 0; j < kXRows; ++j) {
#pragma GCC unroll 8
      for (int i = 0; i < kWRows; i += 4) {
        simd::sum_lanes4(sums[j][i], sums[j][i + 1], sums[j][i + 2], sums[j][i + 3],
                         out + j * out_stride + i);
      }
    }
  } else {
    constexpr int kSums = kWRows * kXRows;
    const auto sum = [&](int f) { return f < kSums ? sums[f / kWRows][f % kWRows] : simd::zero(); };
    float flat[(kSums + 3) / 4 * 4];
#pragma GCC unroll 8
    for (int f = 0; f < kSums; f += 4) {
      simd::sum_lanes4(sum(f), sum(f + 1), sum(f + 2), sum(f + 3), flat + f);
    }
#pragma GCC unroll 24
    for (int f = 0; f < kSums; ++f) {
      if (f % kWRows < n_w) out[f / kWRows * out_stride + f % kWRows] = flat[f];
    }
  }
}

/// Prefetching runs one tile ahead, line after line as one stream (rows in lockstep would be as
/// many streams as rows, which the memory serves at half the speed); beyond the weights it is
/// harmless.
template <class T, int kWRows, int kXRows, bool kPrefetch>
void dot_tile(const typename T::Elem* w,   // [n_in, n_w]
              int n_w,                     // 1..kWRows
              const typename T::XElem* x,  // [kXStepElems, kXRows, steps], zero beyond n_in
              std::int64_t n_in,
              float* out,  // [kWRows, kXRows], rows out_stride apart; where 4 divides kWRows,
                           // columns from n_w on get some value
              std::int64_t out_stride) {
  const typename T::Elem* rows[kWRows];
  const std::int64_t row_elems = T::row_elems(n_in);
  for (int i = 0; i < kWRows; ++i) rows[i] = w + (i < n_w ? i : n_w - 1) * row_elems;
  simd::Vec sums[kXRows][kWRows];
#pragma GCC unroll 8
  for (int j = 0; j < kXRows; ++j) {
#pragma GCC unroll 8
    for (int i = 0; i < kWRows; ++i) sums[j][i] = simd::zero();
  }
  const typename T::Elem* ahead = w + kWRows * row_elems;
  const auto step = [&](auto load_w) {
    typename T::XLane lanes[kXRows];
#pragma GCC unroll 8
    for (int j = 0; j < kXRows; ++j) lanes[j] = T::load_x(x + j * T::kXStepElems);
#pragma GCC unroll 8
    for (int i = 0; i < kWRows; ++i) {
      if constexpr (kPrefetch) __builtin_prefetch(ahead + i * T::kStepElems);
      const typename T::Lane weight = load_w(rows[i]);
#pragma GCC unroll 8
      for (int j = 0; j < kXRows; ++j) sums[j][i] = T::multiply_add(weight, lanes[j], sums[j][i]);
    }
    x += kXRows * T::kXStepElems;
    ahead += kWRows * T::kStepElems;
  };
  const std::int64_t n_whole = n_in / T::kStep;
  const int n_last = static_cast<int>(n_in % T::kStep);
  std::int64_t at = 0;
  for (std::int64_t s = 0; s < n_whole; ++s, at += T::kStepElems) {
    step([&](const typename T::Elem* row) { return T::load(row + at); });
  }
  if (n_last > 0) {
    step([&](const typename T::Elem* row) { return T::load_first(row + at, n_last); });
  }
  store_sums<kWRows, kXRows>(sums, n_w, out, out_stride);
}

}  // namespace modularbase::kernels
