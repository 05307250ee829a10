#pragma once

#include <vector>

#include "modularbase/adapters/pack_batch.h"
#include "modularbase/graph/layer_hook.h"

namespace modularbase {

/// The packs of a step's rows at every site, as fused nodes (CPU).
class FusedPackSites final : public LayerHook {
 public:
  /// \param cut_layer the layer whose rows are cut to those with an output; -1: none.
  FusedPackSites(PackBatch& batch, std::vector<PackPoolKey> pools, int cut_layer)
      : batch_(batch), pools_(std::move(pools)), cut_layer_(cut_layer) {}

  Tensor after_ffn(GraphBuilder& g, Tensor x, Tensor h, int layer) override;

 private:
  PackBatch& batch_;
  const std::vector<PackPoolKey> pools_;
  const int cut_layer_;
};

/// The same in ggml's ops: the reference, and what runs on other devices. Joins packs by their
/// weighted sum only.
class ReferencePackSites final : public LayerHook {
 public:
  ReferencePackSites(PackBatch& batch, std::vector<PackPoolKey> pools, int cut_layer)
      : batch_(batch), pools_(std::move(pools)), cut_layer_(cut_layer) {}

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
  const Inputs& inputs_for(GraphBuilder& g, std::size_t pool, std::int64_t n, bool is_cut);

  PackBatch& batch_;
  const std::vector<PackPoolKey> pools_;
  const int cut_layer_;
  std::vector<Inputs> inputs_;
};

/// One site in ggml's ops: what the packs in `slots`, n_per_row a row, add to the rows.
/// \param x [n_embd, n_rows]
/// \return [n_embd, n_rows]
Tensor build_site(GraphBuilder& g, const SiteWeights& site, Tensor x, Tensor slots, Tensor weights);

}  // namespace modularbase
