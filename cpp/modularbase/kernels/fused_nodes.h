#pragma once

#include <vector>

#include "modularbase/graph/graph_builder.h"
#include "modularbase/kernels/attention.h"
#include "modularbase/kernels/certified_head.h"
#include "modularbase/kernels/linear.h"

namespace modularbase::kernels {

/// The kernels of this folder as graph nodes (CPU only). Each has a reference made of ggml ops in
/// models/.

struct LinearOp {
  std::vector<Tensor> weights;  // each [n_in, n_out]
  std::vector<Tensor> biases;   // each [n_out] or null, as many as weights
  Epilogue epilogue = Epilogue::kNone;
};
/// x [n_in, n_rows] -> [sum of n_out, n_rows] ([n_out, n_rows] for kSwiGlu). residual is null or
/// [n_out, n_rows].
Tensor linear_node(GraphBuilder& g, const LinearOp& op, Tensor x, Tensor residual);

struct AttentionOp {
  const AttentionBatch* batch;  // outlives the graph; filled before each step
  AttentionScratch* scratch;    // outlives the graph
  KvLayer kv;
  int layer;  // among the layers of the query windows
  std::int64_t n_head;
  std::int64_t rope_dim;
  RopeStyle style;
  Tensor q_norm;  // [head_dim] or null
  Tensor k_norm;  // [head_dim] or null
  float norm_eps;
};
/// Rotates q in place and writes k and v to the cache; returns qkv.
Tensor rope_store_node(GraphBuilder& g, const AttentionOp& op, Tensor qkv);
/// qkv [(n_head + 2 n_head_kv) head_dim, n_rows], rotated -> [n_head * head_dim, n_rows]
Tensor attention_node(GraphBuilder& g, const AttentionOp& op, Tensor qkv);

struct HeadOp {
  const HeadWeight* head;
  const HeadScreen* screen;
  const HeadQuery* queries;  // outlives the graph; filled before each step
  HeadWorkspace* workspace;
};
/// x [n_embd, n_rows] -> a node whose completion means that head_rows(workspace) holds the answers.
Tensor certified_head_node(GraphBuilder& g, const HeadOp& op, Tensor x);

}  // namespace modularbase::kernels
