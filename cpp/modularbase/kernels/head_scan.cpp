#include "modularbase/kernels/head_scan.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include "modularbase/kernels/simd.h"
#define MODULARBASE_VNNI 1
#endif

namespace modularbase::kernels {
namespace {

constexpr int kMaxRowsAPass = 4;
constexpr double kEps = 0x1p-24;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr std::int64_t kMaxRowsWithTwoPlanes = 2;

void to_fixed_point(const float* y, std::int64_t n, std::int64_t n_padded, int n_planes,
                    FixedPoint& fixed) {
  const int unit = n_planes == 2 ? 1 : 256;  // with one plane all numbers are multiples of 256
  const float limit = n_planes == 2 ? 127 * 256 + 127 : 127;
  for (auto& plane : fixed.planes) plane.assign(static_cast<std::size_t>(n_padded), 0);
  float largest = 0.0f;
  for (std::int64_t p = 0; p < n; ++p) largest = std::max(largest, std::abs(y[p]));
  const float unit_step = largest / limit;
  const float inverse = unit_step > 0.0f ? 1.0f / unit_step : 0.0f;
  fixed.step = unit_step / static_cast<float>(unit);
  double square = 0.0, square_error = 0.0;
  for (std::int64_t p = 0; p < n; ++p) {
    const float rounded = std::rint(std::clamp(y[p] * inverse, -limit, limit));
    const int value = std::isfinite(rounded) ? static_cast<int>(rounded) * unit : 0;
    const int high = (value + 128) >> 8;
    fixed.planes[0][p] = static_cast<std::int8_t>(high);
    fixed.planes[1][p] = static_cast<std::int8_t>(value - high * 256);
    const double error = static_cast<double>(y[p]) - static_cast<double>(fixed.step) * value;
    square += static_cast<double>(y[p]) * y[p];
    square_error += error * error;
  }
  fixed.norm = std::sqrt(square);
  fixed.error = std::sqrt(square_error);
}

/// Bytes [from, from + 4) of a plane as the integer that is broadcast to all lanes.
std::int32_t four_bytes(const std::vector<std::int8_t>& plane, std::int64_t from) {
  std::int32_t bytes;
  std::memcpy(&bytes, plane.data() + from, sizeof(bytes));
  return bytes;
}

void lay_out(const FixedPoint& fixed, std::int64_t n_groups, int n_planes,
             std::vector<std::int32_t>& out, std::int32_t* offset) {
  out.clear();
  for (std::int64_t group = 0; group < n_groups; ++group) {
    for (int i = 0; i < n_planes; ++i) out.push_back(four_bytes(fixed.planes[i], 4 * group));
  }
  for (int i = 0; i < 2; ++i) {
    std::int32_t sum = 0;
    for (std::int8_t byte : fixed.planes[i]) sum += byte;
    offset[i] = -128 * sum;
  }
}

float to_float(double value) {
  return std::abs(value) <= std::numeric_limits<float>::max() ? static_cast<float>(value)
                                                              : kInfinity;
}

float round_up(double value) {
  return to_float(value * (1.0 + 1e-6));
}

/// The four integer sums of a tile for one row: high and low plane of hot and rest places.
struct TileSums {
  std::int32_t hot[2][kTileRows];
  std::int32_t rest[2][kTileRows];
};

#ifdef MODULARBASE_VNNI
/// levels + 128, so that they are unsigned bytes.
__m512i level_table(const Codebook& book) {
  alignas(16) std::uint8_t table[kLevels];
  for (int k = 0; k < kLevels; ++k) table[k] = static_cast<std::uint8_t>(book.levels[k] + 128);
  return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
}

template <int kRows, int kPlanes>
void sum_tile(const HeadScreen::Data& screen, const std::uint8_t* codes, const ScanRow* const* rows,
              TileSums* sums) {
  __m512i hot[kRows][2], rest[kRows][2],
      rest_high[kRows][2];  // more sums than rows: the additions wait for each other
  const std::int32_t* x_hot[kRows];
  const std::int32_t* x_rest[kRows];
#pragma GCC unroll 4
  for (int j = 0; j < kRows; ++j) {
    for (int i = 0; i < 2; ++i) {
      hot[j][i] = _mm512_set1_epi32(rows[j]->hot_offset[i]);
      rest[j][i] = _mm512_set1_epi32(rows[j]->rest_offset[i]);
      rest_high[j][i] = _mm512_setzero_si512();
    }
    x_hot[j] = rows[j]->hot.data();
    x_rest[j] = rows[j]->rest.data();
  }
  for (std::int64_t v = 0; v < screen.n_hot_vectors(); ++v, codes += kVectorBytes) {
    const __m512i w = _mm512_loadu_si512(codes);
#pragma GCC unroll 4
    for (int j = 0; j < kRows; ++j) {
      for (int i = 0; i < 2; ++i)
        hot[j][i] = _mm512_dpbusd_epi32(hot[j][i], w, _mm512_set1_epi32(x_hot[j][2 * v + i]));
    }
  }
  const __m512i nibble = _mm512_set1_epi8(15);
  const __m512i table = level_table(screen.codebook);
  for (std::int64_t v = 0; v < screen.n_rest_vectors(); ++v, codes += kVectorBytes) {
    const __m512i packed = _mm512_loadu_si512(codes);
    const __m512i low = _mm512_shuffle_epi8(table, _mm512_and_si512(packed, nibble));
    const __m512i high =
        _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(packed, 4), nibble));
#pragma GCC unroll 4
    for (int j = 0; j < kRows; ++j) {
      for (int i = 0; i < kPlanes; ++i) {
        const std::int32_t* x = x_rest[j] + 2 * kPlanes * v + i;
        rest[j][i] = _mm512_dpbusd_epi32(rest[j][i], low, _mm512_set1_epi32(x[0]));
        rest_high[j][i] = _mm512_dpbusd_epi32(rest_high[j][i], high, _mm512_set1_epi32(x[kPlanes]));
      }
    }
  }
  for (int j = 0; j < kRows; ++j) {
    for (int i = 0; i < 2; ++i) {
      _mm512_storeu_si512(sums[j].hot[i], hot[j][i]);
      _mm512_storeu_si512(sums[j].rest[i], _mm512_add_epi32(rest[j][i], rest_high[j][i]));
    }
  }
}
#else
/// sum[r] += the four unsigned bytes of lane r times the four signed bytes of x.
void add_products(const std::uint8_t* bytes, std::int32_t x, std::int32_t* sum) {
  const auto x_bytes = std::bit_cast<std::array<std::int8_t, 4> >(x);
  for (int r = 0; r < kTileRows; ++r) {
    for (int i = 0; i < 4; ++i) sum[r] += bytes[4 * r + i] * x_bytes[i];
  }
}

template <int kRows, int kPlanes>
void sum_tile(const HeadScreen::Data& screen, const std::uint8_t* codes, const ScanRow* const* rows,
              TileSums* sums) {
  for (int j = 0; j < kRows; ++j) {
    for (int i = 0; i < 2; ++i) {
      std::fill_n(sums[j].hot[i], kTileRows, rows[j]->hot_offset[i]);
      std::fill_n(sums[j].rest[i], kTileRows, rows[j]->rest_offset[i]);
    }
  }
  for (std::int64_t v = 0; v < screen.n_hot_vectors(); ++v, codes += kVectorBytes) {
    for (int j = 0; j < kRows; ++j) {
      for (int i = 0; i < 2; ++i) add_products(codes, rows[j]->hot[2 * v + i], sums[j].hot[i]);
    }
  }
  for (std::int64_t v = 0; v < screen.n_rest_vectors(); ++v, codes += kVectorBytes) {
    std::uint8_t low[kVectorBytes], high[kVectorBytes];
    for (int b = 0; b < kVectorBytes; ++b) {
      low[b] = static_cast<std::uint8_t>(screen.codebook.levels[codes[b] & 15] + 128);
      high[b] = static_cast<std::uint8_t>(screen.codebook.levels[codes[b] >> 4] + 128);
    }
    for (int j = 0; j < kRows; ++j) {
      for (int i = 0; i < kPlanes; ++i) {
        const std::int32_t* x = rows[j]->rest.data() + 2 * kPlanes * v + i;
        add_products(low, x[0], sums[j].rest[i]);
        add_products(high, x[kPlanes], sums[j].rest[i]);
      }
    }
  }
}
#endif

float from_bf16(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

/// Turns the sums of a tile into upper bounds; returns the largest of the n_valid first.
float bound_tile(const HeadScreen::Data& screen, std::int64_t tile, const ScanRow& row,
                 const TileSums& sums, int n_valid, float* upper) {
  const float* scale = screen.scale.data() + tile * kTileRows;
  const std::uint16_t* rest_residual = screen.rest_residual.data() + tile * kTileRows;
  const std::uint16_t* hot_residual = screen.hot_residual.data() + tile * kTileRows;
  for (int r = 0; r < kTileRows; ++r) {
    const float hot =
        256.0f * static_cast<float>(sums.hot[0][r]) + static_cast<float>(sums.hot[1][r]);
    const float rest =
        256.0f * static_cast<float>(sums.rest[0][r]) + static_cast<float>(sums.rest[1][r]);
    const float bound = row.base + scale[r] * (row.k_scale + row.k_hot * hot + row.k_rest * rest) +
                        from_bf16(rest_residual[r]) * row.rest_norm +
                        from_bf16(hot_residual[r]) * row.hot_norm;
    upper[r] =
        bound <= kInfinity ? bound : kInfinity;  // a row that cannot be bounded is always kept
  }
  for (int r = n_valid; r < kTileRows; ++r) upper[r] = -kInfinity;
  float largest[kTileRows /
                2];  // halved until one is left: a chain of 16 would take longer than the sums
  for (int r = 0; r < kTileRows / 2; ++r) largest[r] = std::max(upper[r], upper[r + kTileRows / 2]);
  for (int n = kTileRows / 4; n > 0; n /= 2) {
    for (int r = 0; r < n; ++r) largest[r] = std::max(largest[r], largest[r + n]);
  }
  return largest[0];
}

template <int kRows, int kPlanes>
void scan_rows(const HeadScreen::Data& screen, const ScanRow* const* rows, std::int64_t tile,
               float* const* upper, float* const* tile_max) {
  TileSums sums[kRows];
  sum_tile<kRows, kPlanes>(screen, screen.codes.get() + tile * screen.tile_bytes(), rows, sums);
  const std::int64_t first = tile * kTileRows;
  const int n_valid = static_cast<int>(std::min<std::int64_t>(kTileRows, screen.n_vocab - first));
  for (int j = 0; j < kRows; ++j) {
    tile_max[j][tile] = bound_tile(screen, tile, *rows[j], sums[j], n_valid, upper[j] + first);
  }
}

template <int kPlanes>
void scan_all_rows(const HeadScreen::Data& screen, const ScanRow* const* rows, int n_rows,
                   std::int64_t tile, float* const* upper, float* const* tile_max) {
  int j = 0;
  for (; j + kMaxRowsAPass <= n_rows; j += kMaxRowsAPass) {
    scan_rows<kMaxRowsAPass, kPlanes>(screen, rows + j, tile, upper + j, tile_max + j);
  }
  switch (n_rows - j) {
    case 3:
      scan_rows<3, kPlanes>(screen, rows + j, tile, upper + j, tile_max + j);
      break;
    case 2:
      scan_rows<2, kPlanes>(screen, rows + j, tile, upper + j, tile_max + j);
      break;
    case 1:
      scan_rows<1, kPlanes>(screen, rows + j, tile, upper + j, tile_max + j);
      break;
    default:
      break;
  }
}

}  // namespace

int rest_planes(std::int64_t n_rows) {
  return n_rows <= kMaxRowsWithTwoPlanes ? 2 : 1;
}

void prepare_scan_row(const HeadWeight& head, const HeadScreen::Data& screen, const float* x,
                      int n_rest_planes, ScanRow& row) {
  prepare_product_input(head, x, row.product);
  const HeadColumns& columns = screen.columns;
  std::vector<float>& y = row.y;
  y.resize(static_cast<std::size_t>(screen.n_embd));
  double mean_logit = 0.0, mean_size = 0.0, square = 0.0;
  for (std::int64_t p = 0; p < screen.n_embd; ++p) {
    const float value = row.product.multiplied[columns.column[p]];
    y[p] = value * columns.spread[p];
    const double term = static_cast<double>(columns.mean[p]) * value;
    mean_logit += term;
    mean_size += std::abs(term);
    square += static_cast<double>(value) * value;
  }
  FixedPoint& hot = row.hot_y;
  FixedPoint& rest = row.rest_y;
  to_fixed_point(y.data(), screen.n_hot, screen.n_hot, 2, hot);
  to_fixed_point(y.data() + screen.n_hot, screen.n_rest, 8 * screen.n_rest_vectors(), n_rest_planes,
                 rest);
  lay_out(hot, screen.n_hot_vectors(), 2, row.hot, row.hot_offset);
  lay_out(rest, 2 * screen.n_rest_vectors(), n_rest_planes, row.rest, row.rest_offset);

  const double coded_size =
      screen.max_scale * (screen.max_rest_norm * rest.norm + screen.max_hot_norm * hot.norm) +
      screen.max_residual * (rest.norm + hot.norm);
  // Float operations on the way to a bound: fewer than 32 on terms that are not larger than these.
  const double bound_rounding = 64.0 * kEps * (mean_size + coded_size);
  const double product_rounding = product_error(head) * screen.max_row_norm * std::sqrt(square);
  row.base = to_float(mean_logit + (bound_rounding + product_rounding) * (1.0 + 1e-6));
  row.k_scale = round_up(screen.max_rest_norm * rest.error + screen.max_hot_norm * hot.error);
  row.k_hot = hot.step * screen.codebook.hot_step;
  row.k_rest = rest.step;
  row.rest_norm = round_up(rest.norm);
  row.hot_norm = round_up(hot.norm);
  row.bounded = std::isfinite(row.base + row.k_scale + row.rest_norm + row.hot_norm);
}

void scan_tiles(const HeadScreen::Data& screen, const ScanRow* const* rows, int n_rows,
                int n_rest_planes, std::int64_t first, std::int64_t end, float* const* upper,
                float* const* tile_max) {
  const auto scan = n_rest_planes == 2 ? scan_all_rows<2> : scan_all_rows<1>;
  for (std::int64_t tile = first; tile < end; ++tile)
    scan(screen, rows, n_rows, tile, upper, tile_max);
}

}  // namespace modularbase::kernels
