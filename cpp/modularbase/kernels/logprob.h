#pragma once

#include "modularbase/core/types.h"
#include "modularbase/graph/graph_builder.h"

namespace modularbase::kernels {

/// ln softmax(logits)[target] of every row: [n_vocab, n_rows], I32 [n_rows] -> [1, n_rows]. CPU
/// only.
Tensor target_logprob_node(GraphBuilder& g, Tensor logits, Tensor targets);

/// The same in ggml's own ops, for every device; the fused node's reference.
Tensor target_logprob_reference(GraphBuilder& g, Tensor logits, Tensor targets);

/// The same for one row.
float target_logprob(const float* logits, std::int64_t n_vocab, TokenId target);

}  // namespace modularbase::kernels
