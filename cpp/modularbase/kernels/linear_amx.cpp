#include "modularbase/kernels/linear_amx.h"

#if defined(MODULARBASE_LINEAR_AMX)

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#include "modularbase/kernels/simd.h"

namespace modularbase::kernels::amx {
namespace {

constexpr int kTileElems = kTile * kTileK;

/// The operand of LDTILECFG: eight tiles of 16 rows of 64 bytes. In static memory: GCC 12 believes
/// that the instruction reads no more than its first bytes and drops what a function wrote.
struct alignas(64) TileConfig {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
const TileConfig kConfig;

bool request_permission() {
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

/// Rows become columns, of 32-bit numbers.
inline void transpose(__m512i (&r)[kTile]) {
  __m512i t[kTile];
  for (int i = 0; i < kTile; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < kTile; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int c = 0; c < 4; ++c) {
    const __m512i even01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);
    const __m512i odd01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
    const __m512i even23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
    const __m512i odd23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
    t[c] = _mm512_shuffle_i32x4(even01, even23, 0x88);
    t[4 + c] = _mm512_shuffle_i32x4(odd01, odd23, 0x88);
    t[8 + c] = _mm512_shuffle_i32x4(even01, even23, 0xdd);
    t[12 + c] = _mm512_shuffle_i32x4(odd01, odd23, 0xdd);
  }
  std::copy_n(t, kTile, r);
}

/// 32 numbers as BF16.
struct Rounded {
  __m512i high;
  __m512i low;  // what high leaves, as BF16
};

Rounded round_to_bf16(__m512 first, __m512 second) {
  const auto high = (__m512i)_mm512_cvtne2ps_pbh(second, first);
  const __m512 rest_first = first - simd::widen_bf16(_mm512_castsi512_si256(high));
  const __m512 rest_second = second - simd::widen_bf16(_mm512_extracti64x4_epi64(high, 1));
  return {high, (__m512i)_mm512_cvtne2ps_pbh(rest_second, rest_first)};
}

void store_columns(__m512i (&rows)[kTile], std::uint16_t* to) {
  transpose(rows);
  for (int i = 0; i < kTile; ++i) _mm512_storeu_si512(to + i * kTileK, rows[i]);
}

/// One step of n_in: tiles 4 and 5 hold weights, 6 and 7 hold x.
inline void multiply_tiles() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

/// The sums of 16 columns and n rows of x, which the tile holds column by column.
void store_tile(const float* tile, std::int64_t n, float* sums) {
  __m512i rows[kTile];
  for (int i = 0; i < kTile; ++i) rows[i] = _mm512_load_si512(tile + i * kTile);
  transpose(rows);
  for (std::int64_t j = 0; j < n; ++j) _mm512_storeu_si512(sums + j * kColumns, rows[j]);
}

}  // namespace

bool available() {
  static const bool allowed = request_permission();
  return allowed;
}

TileScope::TileScope() {
  _tile_loadconfig(&kConfig);
}

TileScope::~TileScope() {
  _tile_release();
}

void pack_x(const float* const* x_rows, std::int64_t n_rows, std::int64_t n_in,
            Parts<std::uint16_t> packed) {
  std::int64_t at = 0;
  for (std::int64_t first = 0; first < packed_elems(n_rows, 1); first += kTile) {
    for (std::int64_t k = 0; k < n_in; k += kTileK, at += kTileElems) {
      __m512i high[kTile], low[kTile];
      for (int j = 0; j < kTile; ++j) {
        high[j] = low[j] = _mm512_setzero_si512();
        if (first + j >= n_rows) continue;
        const float* from = x_rows[first + j] + k;
        const Rounded rounded = round_to_bf16(simd::load(from), simd::load(from + simd::kLanes));
        high[j] = rounded.high;
        low[j] = rounded.low;
      }
      store_columns(high, packed.high + at);
      if (packed.low) store_columns(low, packed.low + at);
    }
  }
}

void split_f16(const std::uint16_t* w, std::int64_t n, Parts<std::uint16_t> parts) {
  for (std::int64_t i = 0; i < n; i += kTileK) {
    const Rounded rounded =
        round_to_bf16(simd::load_f16(w + i), simd::load_f16(w + i + simd::kLanes));
    _mm512_storeu_si512(parts.high + i, rounded.high);
    _mm512_storeu_si512(parts.low + i, rounded.low);
  }
}

void multiply(Operand w, Operand packed, std::int64_t n_rows, std::int64_t n_in, float* sums) {
  const auto stride = static_cast<std::size_t>(n_in) * sizeof(std::uint16_t);
  const std::int64_t second = kTile * n_in;               // elements to the second tile of rows
  const std::uint16_t* ahead = w.high + kColumns * n_in;  // beyond the weights it is harmless
  for (std::int64_t row = 0; row < n_rows; row += kXRows) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (std::int64_t k = 0; k < n_in; k += kTileK) {
      const std::int64_t x_at = row * n_in + k * kTile;
      _tile_loadd(4, w.high + k, stride);
      _tile_loadd(5, w.high + second + k, stride);
      _tile_loadd(6, packed.high + x_at, 64);
      _tile_loadd(7, packed.high + second + x_at, 64);
      multiply_tiles();
      if (w.low) {
        _tile_loadd(4, w.low + k, stride);
        _tile_loadd(5, w.low + second + k, stride);
        multiply_tiles();
        _tile_loadd(4, w.high + k, stride);
        _tile_loadd(5, w.high + second + k, stride);
        _tile_loadd(6, packed.low + x_at, 64);
        _tile_loadd(7, packed.low + second + x_at, 64);
        multiply_tiles();
      } else if (row == 0) {
        for (int i = 0; i < kColumns; ++i) __builtin_prefetch(ahead + i * kTileK);
        ahead += kColumns * kTileK;
      }
    }
    alignas(64) float tiles[4][kTile * kTile];
    _tile_stored(0, tiles[0], 64);
    _tile_stored(1, tiles[1], 64);
    _tile_stored(2, tiles[2], 64);
    _tile_stored(3, tiles[3], 64);
    for (int tile = 0; tile < 4; ++tile) {
      const std::int64_t first = row + tile % 2 * kTile;
      const std::int64_t n = std::clamp<std::int64_t>(n_rows - first, 0, kTile);
      store_tile(tiles[tile], n, sums + first * kColumns + tile / 2 * kTile);
    }
  }
}

}  // namespace modularbase::kernels::amx
#endif
