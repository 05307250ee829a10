#pragma once

#include <vector>

#include "modularbase/graph/graph_builder.h"

namespace modularbase {

/// Which implementation a block of the graph uses.
enum class KernelPath {
  kFused,      // our CPU kernels where they support the weights' type
  kReference,  // ggml's own ops: the oracle of the kernels, and the path of other devices
};

/// A matrix and, in some families, its bias.
struct Linear {
  Tensor weight = nullptr;  // [n_in, n_out]
  Tensor bias = nullptr;    // [n_out] or null
};

/// W_i x + b_i of every linear, one below the other: [n_in, n_rows] -> [sum of n_out, n_rows].
Tensor build_linear(GraphBuilder& g, KernelPath path, const std::vector<Linear>& linears, Tensor x);
/// residual + W x + b.
Tensor build_linear_add(GraphBuilder& g, KernelPath path, const Linear& linear, Tensor x,
                        Tensor residual);
/// silu(W_gate x) * W_up x.
Tensor build_swiglu(GraphBuilder& g, KernelPath path, const Linear& gate, const Linear& up,
                    Tensor x);

}  // namespace modularbase
