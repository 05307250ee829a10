#pragma once

#include <vector>

#include "modularbase/adapters/pack_batch.h"
#include "modularbase/graph/layer_hook.h"

namespace modularbase {

/// Which rows a graph's layers compute.
struct RowScopes {
  int split = 0;       // layers below it compute token rows only
  int cut_layer = -1;  // computes rows with an output only; -1: none

  RowScope of(int layer) const {
    if (layer == cut_layer) return RowScope::kOutputs;
    return layer < split ? RowScope::kTokens : RowScope::kAll;
  }
};

/// The packs of a step's rows at every site, as fused nodes (CPU).
class FusedPackSites final : public LayerHook {
 public:
  FusedPackSites(PackBatch& batch, std::vector<PackPoolKey> pools, const RowScopes& scopes)
      : batch_(batch), pools_(std::move(pools)), scopes_(scopes) {}

  Tensor after_ffn(GraphBuilder& g, Tensor x, Tensor h, int layer) override;

 private:
  PackBatch& batch_;
  const std::vector<PackPoolKey> pools_;
  const RowScopes scopes_;
};

/// The same in ggml's ops: the reference, and what runs on other devices. Joins packs by their
/// weighted sum only.
class ReferencePackSites final : public LayerHook {
 public:
  ReferencePackSites(PackBatch& batch, std::vector<PackPoolKey> pools, const RowScopes& scopes)
      : batch_(batch), pools_(std::move(pools)), scopes_(scopes) {}

  Tensor after_ffn(GraphBuilder& g, Tensor x, Tensor h, int layer) override;
  /// Before each computation.
  void fill_inputs();

 private:
  /// Slots and weights of some rows in one pool, n_per_row a row.
  struct Inputs {
    std::size_t pool;
    PackRows* rows;
    Tensor slots = nullptr;    // I32 [n_per_row * n_rows]
    Tensor weights = nullptr;  // F32 [n_per_row * n_rows]
  };
  const Inputs& inputs_for(GraphBuilder& g, std::size_t pool, std::int64_t n, RowScope scope);

  PackBatch& batch_;
  const std::vector<PackPoolKey> pools_;
  const RowScopes scopes_;
  std::vector<Inputs> inputs_;
};

/// One site in ggml's ops: what the packs in `slots`, n_per_row a row, add to the rows.
/// \param x [n_embd, n_rows]
/// \return [n_embd, n_rows]
Tensor build_site(GraphBuilder& g, const SiteWeights& site, Tensor x, Tensor slots, Tensor weights);

}  // namespace modularbase
