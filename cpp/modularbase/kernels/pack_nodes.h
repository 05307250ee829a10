#pragma once

#include <memory>
#include <vector>

#include "modularbase/graph/graph_builder.h"
#include "modularbase/kernels/pack_merge.h"
#include "modularbase/kernels/pack_route.h"

namespace modularbase::kernels {

/// The kernels of a pack's site as graph nodes (CPU only); adapters/ has the same in ggml's ops.

/// What the nodes of one pool share in a graph. Outlives it; uses are filled before each step.
struct PackPoolStep {
  PackUses uses;
  PackRoutes routes;
};

/// x [n_embd, n_rows] -> W_out y of every use [n_embd, n_uses].
Tensor pack_delta_node(GraphBuilder& g, const SiteWeights& site, PackPoolStep& step,
                       std::int64_t n_uses, Tensor x);

/// Up to so many uses, threads rather do the small parts twice than wait for each other.
inline constexpr std::int64_t kFewUses = 8;

/// A few rows, none of them with two packs: h [n_embd, n_rows] with the packs' shares added in
/// place, in four nodes instead of seven.
Tensor pack_add_few_node(GraphBuilder& g, const SiteWeights& site, PackPoolStep& step,
                         std::int64_t n_uses, Tensor x, Tensor h);

/// One pool's deltas at a layer (null: it has no site there), and whose token gates scale them.
struct PoolDelta {
  Tensor delta;
  const PackPoolStep* step;
};
/// h [n_embd, n_rows] -> with the packs' shares added.
Tensor pack_merge_node(GraphBuilder& g, const std::vector<PoolDelta>& pools,
                       const PackShares& shares, Tensor h, int layer);

}  // namespace modularbase::kernels
