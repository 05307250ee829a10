#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "modularbase/kernels/certified_head.h"

namespace modularbase::kernels {

inline constexpr int kTileRows =
    16;  // vocabulary rows whose codes are interleaved, one a 32-bit lane
inline constexpr int kVectorBytes = 64;  // one load: 16 rows x 4 bytes
inline constexpr int kLevels = 16;

struct FreeBytes {
  void operator()(std::uint8_t* bytes) const;
};
using ScreenBytes = std::unique_ptr<std::uint8_t[], FreeBytes>;
/// Uninitialised and aligned to a cache line; large blocks ask for huge pages, which halves the
/// time to build.
ScreenBytes allocate_bytes(std::size_t n_bytes);

/// How the columns of the head are ordered and scaled before its rows are coded. "Place" p holds
/// column[p]. Row i is  w_i[column[p]] = mean[p] + spread[p] * z_i[p]  and z is what is coded.
struct HeadColumns {
  std::int64_t n_hot = 0;  // places 0..n_hot-1 get 8 bits, the rest 4; a multiple of 4
  std::vector<std::int32_t>
      swap;  // [n_hot] place i was exchanged with place swap[i], in this order
  std::vector<std::int32_t> column;   // [n_embd] the result of the exchanges
  std::vector<float> mean;            // [n_embd]
  std::vector<float> spread;          // [n_embd]
  std::vector<float> inverse_spread;  // [n_embd]
};

/// The 16 values a 4-bit code stands for, in units of a row's scale, and the bounds between them.
struct Codebook {
  std::array<std::int8_t, kLevels> levels{};  // ascending
  std::array<std::int8_t, kLevels - 1> bounds{};
  float unit = 1.0f;      // a row's scale is its root mean square times this
  float hot_step = 1.0f;  // an 8-bit code counts this many scales
};

/// z_i is coded as scale[i] * (hot_step * q on hot places, levels[code] on the others).
struct HeadScreen::Data {
  std::int64_t n_embd = 0;
  std::int64_t n_vocab = 0;
  std::int64_t n_tiles = 0;
  std::int64_t n_hot = 0;
  std::int64_t n_rest = 0;  // without padding
  HeadColumns columns;
  Codebook codebook;
  // A tile: n_hot / 4 vectors of 8-bit codes (+128), then vectors of 4-bit codes, 8 places a
  // vector: of a row's four bytes the low nibbles are the first four places.
  ScreenBytes codes;
  std::vector<float> scale;  // [n_tiles * kTileRows]
  std::vector<std::uint16_t>
      rest_residual;  // [n_tiles * kTileRows], norms of z - coded z; BF16, rounded up
  std::vector<std::uint16_t> hot_residual;  // [n_tiles * kTileRows]
  // Maxima over the rows, for the error terms that are too small to be kept a row.
  float max_scale = 0.0f;
  float max_residual = 0.0f;
  float max_rest_norm = 0.0f;  // of the coded row, in units of its scale
  float max_hot_norm = 0.0f;
  float max_row_norm = 0.0f;  // |w_i|

  std::int64_t n_hot_vectors() const { return n_hot / 4; }
  std::int64_t n_rest_vectors() const { return (n_rest + 7) / 8; }
  std::int64_t tile_bytes() const { return (n_hot_vectors() + n_rest_vectors()) * kVectorBytes; }
};

/// Row i of the head in F32.
void load_head_row(const HeadWeight& head, std::int64_t i, float* row);

}  // namespace modularbase::kernels
