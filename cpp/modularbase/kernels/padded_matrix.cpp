#include "modularbase/kernels/padded_matrix.h"

#include "modularbase/kernels/simd.h"

namespace modularbase::kernels {
namespace {

using simd::kLanes;
using simd::Vec;

constexpr int kRows = kLanes == 16 ? 8 : 4;  // kRows x kVecs sums fit the registers
constexpr int kVecs = 2;
static_assert(PaddedMatrix::kRowBlock % kRows == 0 && PaddedMatrix::kColumnBlock % kLanes == 0);

/// The left factor: element (r, k) is data[r * row_stride + k * k_stride].
struct LeftFactor {
  const float* data;
  std::int64_t row_stride, k_stride;
};

template <int kNVecs>
void tile_product(const LeftFactor& a, std::int64_t n_k, const float* b, std::int64_t b_stride,
                  float* c, std::int64_t c_stride) {
  Vec sums[kRows][kNVecs];
  for (auto& row : sums)
    for (Vec& sum : row) sum = simd::zero();
  for (std::int64_t k = 0; k < n_k; ++k) {
    Vec columns[kNVecs];
    for (int v = 0; v < kNVecs; ++v) columns[v] = simd::load(b + k * b_stride + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const Vec factor = simd::set1(a.data[r * a.row_stride + k * a.k_stride]);
      for (int v = 0; v < kNVecs; ++v) sums[r][v] = simd::fma(factor, columns[v], sums[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kNVecs; ++v) simd::store(c + r * c_stride + v * kLanes, sums[r][v]);
}

void product(const LeftFactor& a, std::int64_t n_k, const PaddedMatrix& b, PaddedMatrix& c) {
  for (std::int64_t column = 0; column < b.n_columns();) {
    const bool both = column + kLanes < b.n_columns();
    const auto tile = both ? tile_product<kVecs> : tile_product<1>;
    for (std::int64_t row = 0; row < c.padded_rows(); row += kRows) {
      const LeftFactor rows{a.data + row * a.row_stride, a.row_stride, a.k_stride};
      tile(rows, n_k, b.row(0) + column, b.stride(), c.row(row) + column, c.stride());
    }
    column += both ? kVecs * kLanes : kLanes;
  }
}

template <int kNVecs>
void combine_strip(const float* factors, const float* a, std::int64_t stride, std::int64_t n_rows,
                   float* out) {
  Vec sums[kNVecs];
  for (Vec& sum : sums) sum = simd::zero();
  for (std::int64_t i = 0; i < n_rows; ++i) {
    const Vec factor = simd::set1(factors[i]);
    for (int v = 0; v < kNVecs; ++v)
      sums[v] = simd::fma(factor, simd::load(a + i * stride + v * kLanes), sums[v]);
  }
  for (int v = 0; v < kNVecs; ++v) simd::store(out + v * kLanes, sums[v]);
}

}  // namespace

void multiply(const PaddedMatrix& a, const PaddedMatrix& b, PaddedMatrix& c) {
  c.reshape(a.n_rows(), b.n_columns());
  product({a.row(0), a.stride(), 1}, a.n_columns(), b, c);
}

void multiply_transposed(const PaddedMatrix& a, const PaddedMatrix& b, std::int64_t n_rows,
                         PaddedMatrix& c) {
  c.reshape(a.n_columns(), b.n_columns());
  product({a.row(0), 1, a.stride()}, n_rows, b, c);
}

void combine_rows(const float* factors, const PaddedMatrix& a, std::int64_t n_rows, float* out) {
  constexpr int kWide = 8;
  std::int64_t column = 0;
  for (; column + kWide * kLanes <= a.stride(); column += kWide * kLanes)
    combine_strip<kWide>(factors, a.row(0) + column, a.stride(), n_rows, out + column);
  for (; column < a.stride(); column += kLanes)
    combine_strip<1>(factors, a.row(0) + column, a.stride(), n_rows, out + column);
}

}  // namespace modularbase::kernels
