#pragma once

#include <cstdint>

/// The float vector of the machine this is built for: Vec holds kLanes floats; + - * / work on it
/// lane by lane. Each of the three headers defines the same functions, so that a kernel is written
/// once.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "modularbase/kernels/simd_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "modularbase/kernels/simd_avx2.h"
#else
#include "modularbase/kernels/simd_generic.h"
#endif

namespace modularbase::kernels::simd {

/// e^v to a relative error below 2e-7 for v of at most 88; v is clamped to where e^v is a normal
/// float.
inline Vec exp_below_88(Vec v) {
  v = max(set1(-87.0f), v);
  const Vec n = round(v * set1(1.44269504f));
  // ln 2 in two parts: n times the first is exact, so r keeps all its bits.
  Vec r = fma(n, set1(-0.693359375f), v);
  r = fma(n, set1(2.12194440e-4f), r);
  Vec p = set1(1.9875691500e-4f);  // minimax polynomial of (e^r - 1 - r) / r^2 on |r| <= ln(2) / 2
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  return scale_by_pow2(fma(p, r * r, r + set1(1.0f)), n);
}

/// The same for any v.
inline Vec exp(Vec v) {
  return exp_below_88(min(set1(88.0f), v));
}

inline Vec silu(Vec v) {
  return v / (set1(1.0f) + exp(zero() - v));
}

}  // namespace modularbase::kernels::simd
