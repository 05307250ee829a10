#include "modularbase/models/attention_path.h"

#include <cmath>
#include <utility>

#include "modularbase/core/errors.h"

namespace modularbase {

namespace {

template <class Inputs>
const Inputs& inputs_of(const std::vector<Inputs>& groups, int layer) {
  for (const Inputs& inputs : groups) {
    if (inputs.memory->geometry().holds(layer)) return inputs;
  }
  throw Error("layer " + std::to_string(layer) + ": expected a group of the KV cache, found none");
}

}  // namespace

FusedAttention::FusedAttention(const ModelConfig& config, std::vector<FusedInputs> groups)
    : config_(config), groups_(std::move(groups)) {}

kernels::AttentionOp FusedAttention::op(int layer) const {
  const FusedInputs& inputs = inputs_of(groups_, layer);
  return {.batch = inputs.batch,
          .scratch = inputs.scratch,
          .kv = inputs.memory->layer(layer),
          .layer = layer - static_cast<int>(inputs.memory->geometry().first_layer),
          .n_head = config_.n_head,
          .rope_dim = config_.rope_dim,
          .style = config_.rope_style,
          .q_norm = nullptr,
          .k_norm = nullptr,
          .norm_eps = config_.norm_eps};
}

Tensor FusedAttention::store(GraphBuilder& g, Tensor qkv, Tensor q_norm, Tensor k_norm, int layer) {
  kernels::AttentionOp store_op = op(layer);
  store_op.q_norm = q_norm;
  store_op.k_norm = k_norm;
  return kernels::rope_store_node(g, store_op, qkv);
}

Tensor FusedAttention::attend(GraphBuilder& g, Tensor stored, int layer) {
  return kernels::attention_node(g, op(layer), stored);
}

ReferenceAttention::ReferenceAttention(const ModelConfig& config, Tensor rope_factors,
                                       std::vector<ReferenceInputs> groups)
    : config_(config), rope_factors_(rope_factors), groups_(std::move(groups)) {}

// Heads [first, first + n) of every row: [head_dim, n, n_rows].
Tensor ReferenceAttention::heads(GraphBuilder& g, Tensor qkv, std::int64_t first,
                                 std::int64_t n) const {
  const std::size_t head_bytes = static_cast<std::size_t>(config_.head_dim) * sizeof(float);
  Tensor view = ggml_view_3d(g.ctx(), qkv, config_.head_dim, n, qkv->ne[1], head_bytes, qkv->nb[1],
                             static_cast<std::size_t>(first) * head_bytes);
  return ggml_cont(g.ctx(), view);
}

Tensor ReferenceAttention::rotate(GraphBuilder& g, const ReferenceInputs& inputs, Tensor heads,
                                  Tensor norm) const {
  if (norm) heads = ggml_mul(g.ctx(), ggml_rms_norm(g.ctx(), heads, config_.norm_eps), norm);
  const int mode =
      config_.rope_style == kernels::RopeStyle::kNeox ? GGML_ROPE_TYPE_NEOX : GGML_ROPE_TYPE_NORMAL;
  return ggml_rope_ext(g.ctx(), heads, inputs.positions, rope_factors_,
                       static_cast<int>(config_.rope_dim), mode,
                       static_cast<int>(config_.n_ctx_train), config_.rope_freq_base,
                       config_.rope_freq_scale, 0.0f, 1.0f, 0.0f, 0.0f);
}

// The cache's rows [head_dim, n], with the new heads written.
Tensor ReferenceAttention::write(GraphBuilder& g, const ReferenceInputs& inputs, Tensor rows,
                                 Tensor heads) const {
  Tensor flat = ggml_reshape_2d(g.ctx(), heads, config_.head_dim, heads->ne[1] * heads->ne[2]);
  Tensor written = ggml_set_rows(g.ctx(), rows, flat, inputs.write_rows);
  g.expand(written);
  return written;
}

Tensor ReferenceAttention::store(GraphBuilder& g, Tensor qkv, Tensor q_norm, Tensor k_norm,
                                 int layer) {
  const ReferenceInputs& inputs = inputs_of(groups_, layer);
  const std::int64_t n_head = config_.n_head;
  const std::int64_t n_head_kv = config_.n_head_kv;
  Tensor k = rotate(g, inputs, heads(g, qkv, n_head, n_head_kv), k_norm);
  Tensor v = heads(g, qkv, n_head + n_head_kv, n_head_kv);
  k_rows_ = write(g, inputs, inputs.memory->k(layer), k);
  v_rows_ = write(g, inputs, inputs.memory->v(layer), v);
  return rotate(g, inputs, heads(g, qkv, 0, n_head), q_norm);
}

Tensor ReferenceAttention::read(GraphBuilder& g, const ReferenceInputs& inputs,
                                Tensor cache_rows) const {
  Tensor rows = ggml_get_rows(g.ctx(), cache_rows, inputs.read_rows);
  return ggml_reshape_3d(g.ctx(), rows, config_.head_dim, inputs.mask->ne[0], config_.n_head_kv);
}

Tensor ReferenceAttention::attend(GraphBuilder& g, Tensor q, int layer) {
  const ReferenceInputs& inputs = inputs_of(groups_, layer);
  ggml_context* ctx = g.ctx();
  const std::int64_t n_rows = q->ne[2];
  q = ggml_permute(ctx, q, 0, 2, 1, 3);                            // [head_dim, n_rows, n_head]
  Tensor scores = ggml_mul_mat(ctx, read(g, inputs, k_rows_), q);  // [n_kv, n_rows, n_head]
  ggml_prec_set_acc(scores, GGML_PREC_F32);
  const float scale = 1.0f / std::sqrt(static_cast<float>(config_.head_dim));
  scores = ggml_soft_max_ext(ctx, scores, inputs.mask, scale, 0.0f);
  Tensor v =
      ggml_cont(ctx, ggml_transpose(ctx, read(g, inputs, v_rows_)));  // [n_kv, head_dim, n_head_kv]
  Tensor out = ggml_mul_mat(ctx, v, scores);                          // [head_dim, n_rows, n_head]
  out = ggml_cont(ctx, ggml_permute(ctx, out, 0, 2, 1, 3));           // [head_dim, n_head, n_rows]
  return ggml_reshape_2d(ctx, out, config_.n_head * config_.head_dim, n_rows);
}

}  // namespace modularbase
