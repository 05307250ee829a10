#pragma once

#include "modularbase/graph/graph_builder.h"

namespace modularbase {

/// The weights of one site of packs of equal geometry, stacked over S slots; slot 0 is all zero. An
/// expert's matrix is number experts_per_slot * slot + expert.
struct SiteWeights {
  Tensor in;           // [n_embd, d_inner, S]
  Tensor norm;         // [d_inner, S] F32
  Tensor router;       // [d_inner, n_expert, S] F32
  Tensor token_gate;   // [n_embd, S] F32
  Tensor token_bias;   // [1, S] F32
  Tensor expert_gate;  // [d_inner, d_ff, experts]
  Tensor expert_up;    // [d_inner, d_ff, experts]
  Tensor expert_down;  // [d_ff, d_inner, experts]
  Tensor out;          // [d_inner, n_embd, S]
  Tensor expert_ids;   // I32 [n_expert, S]: numbers of each slot's experts
  std::int64_t n_expert_used;
  float norm_eps;
};

}  // namespace modularbase
