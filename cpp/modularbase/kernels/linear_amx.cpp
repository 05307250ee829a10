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

__m512i round_to_bf16(const float* x) {
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + 16), _mm512_loadu_ps(x));
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

void pack_x(const float* x, std::int64_t n_rows, std::int64_t n_in, std::uint16_t* packed) {
  for (std::int64_t first = 0; first < packed_elems(n_rows, 1); first += kTile) {
    for (std::int64_t k = 0; k < n_in; k += kTileK, packed += kTileElems) {
      __m512i rows[kTile];
      for (int j = 0; j < kTile; ++j) {
        const std::int64_t row = first + j;
        rows[j] = row < n_rows ? round_to_bf16(x + row * n_in + k) : _mm512_setzero_si512();
      }
      transpose(rows);
      for (int i = 0; i < kTile; ++i) _mm512_storeu_si512(packed + i * kTileK, rows[i]);
    }
  }
}

void multiply(const std::uint16_t* w, const std::uint16_t* packed, std::int64_t n_rows,
              std::int64_t n_in, float* sums) {
  const auto stride = static_cast<std::size_t>(n_in) * sizeof(*w);
  const std::uint16_t* ahead = w + kColumns * n_in;  // beyond the weights it is harmless
  for (std::int64_t row = 0; row < n_rows; row += kXRows, packed += kXRows * n_in) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (std::int64_t k = 0; k < n_in; k += kTileK) {
      _tile_loadd(4, w + k, stride);
      _tile_loadd(5, w + kTile * n_in + k, stride);
      _tile_loadd(6, packed + k * kTile, 64);
      _tile_loadd(7, packed + kTile * n_in + k * kTile, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
      if (row == 0) {
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
