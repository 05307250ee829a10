#pragma once

#include <cstdint>
#include <span>

#include "modularbase/kernels/pack_rows.h"

namespace modularbase::kernels {

/// What one pool's packs add at a layer.
struct PackDeltas {
  const float* deltas;   // [n_embd, n_uses]: W_out y
  const float* factors;  // [n_uses]: token gates
};

struct PackMergeArgs {
  const PackShares* shares;
  std::span<const PackDeltas> pools;
  std::int64_t n_embd;
  std::int64_t layer;
  const float* h;  // [n_embd, n_rows]
  float* out;      // [n_embd, n_rows]: h with every row's packs joined by its policy
};

/// h' = h + sum over the row's packs of weight * scale * token gate * delta, or what the row's
/// policy makes of them.
void pack_merge(const PackMergeArgs& args, int ith, int nth);

}  // namespace modularbase::kernels
