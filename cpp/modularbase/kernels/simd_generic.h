#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

// See simd.h. Vector extensions of GCC and Clang: four lanes, which every 64-bit machine has.
namespace modularbase::kernels::simd {

using Vec = float __attribute__((vector_size(16)));
using Bits = std::uint32_t __attribute__((vector_size(16)));
inline constexpr int kLanes = 4;

inline Vec set1(float value) {
  return Vec{value, value, value, value};
}
inline Vec zero() {
  return set1(0.0f);
}
inline Vec load_first(const float* p, int n) {
  Vec v = zero();
  std::memcpy(&v, p, static_cast<std::size_t>(n) * sizeof(float));
  return v;
}
inline Vec load(const float* p) {
  return load_first(p, kLanes);
}
inline void store_first(float* p, int n, Vec v) {
  std::memcpy(p, &v, static_cast<std::size_t>(n) * sizeof(float));
}
inline void store(float* p, Vec v) {
  store_first(p, kLanes, v);
}

inline Bits load_bits(const std::uint16_t* p, int n) {
  Bits bits{};
  for (int i = 0; i < n; ++i) bits[i] = p[i];
  return bits;
}
inline Vec as_floats(Bits bits) {
  return std::bit_cast<Vec>(bits);
}
inline Vec widen_f16(Bits bits) {
  // Exponent bias 15 -> 127 by a product, which also turns subnormal halves into normal floats.
  const Bits magnitude = std::bit_cast<Bits>(as_floats((bits & 0x7fffu) << 13) * set1(0x1p112f));
  const Bits is_special = std::bit_cast<Bits>((bits & 0x7c00u) == 0x7c00u);  // infinity or NaN
  return as_floats(magnitude | (is_special & 0x7f800000u) | ((bits & 0x8000u) << 16));
}
inline Vec load_f16_first(const std::uint16_t* p, int n) {
  return widen_f16(load_bits(p, n));
}
inline Vec load_f16(const std::uint16_t* p) {
  return load_f16_first(p, kLanes);
}
inline Vec load_bf16_first(const std::uint16_t* p, int n) {
  return as_floats(load_bits(p, n) << 16);
}
inline Vec load_bf16(const std::uint16_t* p) {
  return load_bf16_first(p, kLanes);
}

/// Signed bytes as floats.
inline Vec load_s8(const std::int8_t* p) {
  return Vec{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]),
             static_cast<float>(p[3])};
}
/// One F16 number in all lanes.
inline Vec set1_f16(std::uint16_t bits) {
  return widen_f16(Bits{bits, bits, bits, bits});
}
/// v in the lanes whose bit is set, otherwise in the others.
inline Vec select(std::uint64_t bits, Vec v, Vec otherwise) {
  for (int i = 0; i < kLanes; ++i) v[i] = (bits >> i & 1) != 0 ? v[i] : otherwise[i];
  return v;
}

inline Vec fma(Vec a, Vec b, Vec c) {
  return a * b + c;
}
inline Vec min(Vec a, Vec b) {
  return a < b ? a : b;
}
inline Vec max(Vec a, Vec b) {
  return a > b ? a : b;
}
inline Vec round(Vec v) {
  const Vec magic = set1(12582912.0f);  // 1.5 * 2^23: the sum has no fraction bits while |v| < 2^22
  return (v + magic) - magic;
}
inline Vec scale_by_pow2(Vec v, Vec n) {
  using Ints = std::int32_t __attribute__((vector_size(16)));
  const Ints exponent = __builtin_convertvector(n, Ints) + 127;
  return v * std::bit_cast<Vec>(exponent << 23);
}

inline float max_lanes(Vec v) {
  const float low = v[0] > v[1] ? v[0] : v[1];
  const float high = v[2] > v[3] ? v[2] : v[3];
  return low > high ? low : high;
}

/// out[i] = sum of the lanes of v[i]. The same tree for each of the four, so that equal vectors
/// give equal sums.
inline void sum_lanes4(Vec v0, Vec v1, Vec v2, Vec v3, float* out) {
  store(out, Vec{v0[0], v1[0], v2[0], v3[0]} + Vec{v0[2], v1[2], v2[2], v3[2]} +
                 (Vec{v0[1], v1[1], v2[1], v3[1]} + Vec{v0[3], v1[3], v2[3], v3[3]}));
}
/// out[i] = the largest lane of v[i].
inline void max_lanes4(Vec v0, Vec v1, Vec v2, Vec v3, float* out) {
  out[0] = max_lanes(v0);
  out[1] = max_lanes(v1);
  out[2] = max_lanes(v2);
  out[3] = max_lanes(v3);
}

}  // namespace modularbase::kernels::simd
