#pragma once

#include <cstdint>

/// Products of many rows on the tile unit (Intel AMX): 16 weight rows x 16 rows of x a tile, 32
/// elements of n_in an instruction, sums in F32. The unit multiplies BF16; F16 weights and their x
/// go in as sums of two BF16 numbers each, of whose four products the three larger ones are taken:
/// as exact as 16 bits of mantissa, where F16 has 11.
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define MODULARBASE_LINEAR_AMX 1

namespace modularbase::kernels::amx {

inline constexpr int kTile = 16;            // rows of a tile
inline constexpr int kTileK = 32;           // elements of n_in in a tile's row
inline constexpr int kColumns = 2 * kTile;  // output columns finished together
inline constexpr int kXRows = 2 * kTile;    // rows of x are padded to multiples of this

/// Whether the system lets this process use the tiles (asked once).
bool available();

/// The tiles' shapes, for the calling thread, while it lives.
class TileScope {
 public:
  TileScope();
  ~TileScope();
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

/// An operand: BF16 numbers, and what they leave of the numbers they stand for (null: nothing).
template <class T>
struct Parts {
  T* high;
  T* low;
};
using Operand = Parts<const std::uint16_t>;

/// Elements of n_rows packed rows, of each part.
inline std::int64_t packed_elems(std::int64_t n_rows, std::int64_t n_in) {
  return (n_rows + kXRows - 1) / kXRows * kXRows * n_in;
}
/// Rounds rows of x, n_in each, to BF16, in the order the tiles read them: [2, kTile,
/// n_in / 2] for each kTile rows, zero beyond n_rows. kTileK divides n_in.
void pack_x(const float* const* x_rows, std::int64_t n_rows, std::int64_t n_in,
            Parts<std::uint16_t> packed);
/// F16 weights as two parts; kTileK divides n.
void split_f16(const std::uint16_t* w, std::int64_t n, Parts<std::uint16_t> parts);

/// sums [kColumns, n_rows] = W x for kColumns weight rows [n_in], inside a TileScope. Both operands
/// have low parts, or neither.
void multiply(Operand w, Operand packed, std::int64_t n_rows, std::int64_t n_in, float* sums);

}  // namespace modularbase::kernels::amx
#endif
