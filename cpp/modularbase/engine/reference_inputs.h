#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "modularbase/engine/attention_inputs.h"
#include "modularbase/models/reference_attention.h"

namespace modularbase {

/// What of a step decides the shape of a graph with the reference attention: numbers that are
/// rounded up, so that the next steps find the same graph.
struct ReferenceShape {
  std::int64_t n_kv = 0;                                    // exact tokens
  std::array<std::int64_t, kernels::kNKvTiers> n_blocks{};  // of the other tiers
  std::int64_t n_window = 0;                                // rows whose queries are kept
  bool operator==(const ReferenceShape&) const = default;
};
ReferenceShape reference_shape(const AttentionInputs& step);

/// New inputs of a graph; no tensors when there are no rows.
ReferenceInputs add_reference_inputs(GraphBuilder& g, const KvGroup& group, std::int64_t n_head,
                                     std::int64_t n_rows, const ReferenceShape& shape);
void fill_reference(const ReferenceInputs& inputs, const AttentionInputs& step);

/// Puts what a computed graph shows of the kept rows into the windows that want them.
void keep_queries(const std::vector<ReferenceQueries>& queries, const AttentionInputs& step);

/// Fills an input of a graph. One that the graph does not use (a hidden state before any attention)
/// has no memory, one that it does not have is null.
template <class T>
void set_input(Tensor tensor, const std::vector<T>& values) {
  if (tensor && tensor->buffer)
    ggml_backend_tensor_set(tensor, values.data(), 0, ggml_nbytes(tensor));
}

}  // namespace modularbase
