#include "modularbase/kernels/fused_nodes.h"

#include <atomic>
#include <cmath>

namespace modularbase::kernels {
namespace {

const float* floats(const ggml_tensor* tensor) {
  return tensor ? static_cast<const float*>(tensor->data) : nullptr;
}

/// A node whose threads share one work counter.
class CountedNode : public CustomNode {
 public:
  void reset() override { next_chunk_.store(0, std::memory_order_relaxed); }

 protected:
  std::atomic<int> next_chunk_{0};
};

class LinearNode final : public CountedNode {
 public:
  LinearNode(const LinearOp& op, bool has_residual) : op_(op), has_residual_(has_residual) {
    for (Tensor weight : op.weights) weights_.push_back({weight->type, nullptr, weight->ne[1]});
  }

  void run(ggml_tensor* dst, int ith, int nth) override {
    const ggml_tensor* x = dst->src[0];
    LinearWeight weights[3];
    for (std::size_t i = 0; i < weights_.size(); ++i) {
      weights[i] = weights_[i];
      weights[i].data = op_.weights[i]->data;
      weights[i].bias = floats(op_.biases[i]);
    }
    linear({.weights = weights,
            .n_weights = static_cast<int>(weights_.size()),
            .n_in = x->ne[0],
            .n_rows = x->ne[1],
            .x = floats(x),
            .residual = has_residual_ ? floats(dst->src[1]) : nullptr,
            .y = static_cast<float*>(dst->data),
            .epilogue = op_.epilogue,
            .next_chunk = &next_chunk_},
           ith, nth);
  }

 private:
  LinearOp op_;
  bool has_residual_;
  std::vector<LinearWeight> weights_;
};

class RopeStoreNode final : public CustomNode {
 public:
  explicit RopeStoreNode(const AttentionOp& op) : op_(op) {}

  void run(ggml_tensor* dst, int ith, int nth) override {
    rope_store({.batch = op_.batch,
                .kv = op_.kv,
                .n_head = op_.n_head,
                .rope_dim = op_.rope_dim,
                .style = op_.style,
                .q_norm = floats(op_.q_norm),
                .k_norm = floats(op_.k_norm),
                .norm_eps = op_.norm_eps,
                .layer = op_.layer,
                .qkv = static_cast<float*>(dst->data)},
               ith, nth);
  }

 private:
  AttentionOp op_;
};

class AttentionNode final : public CountedNode {
 public:
  explicit AttentionNode(const AttentionOp& op) : op_(op) {}

  void run(ggml_tensor* dst, int ith, int nth) override {
    const ggml_tensor* qkv = dst->src[0];
    attention({.batch = op_.batch,
               .kv = op_.kv,
               .layer = op_.layer,
               .n_head = op_.n_head,
               .qkv_stride = qkv->ne[0],
               .qkv = floats(qkv),
               .scale = 1.0f / std::sqrt(static_cast<float>(op_.kv.head_dim)),
               .out = static_cast<float*>(dst->data),
               .next_chunk = &next_chunk_,
               .scratch = op_.scratch},
              ith, nth);
  }

 private:
  AttentionOp op_;
};

using HeadPhase = void (*)(const CertifiedHeadArgs&, int, int);

class HeadNode final : public CountedNode {
 public:
  HeadNode(const HeadOp& op, HeadPhase phase) : op_(op), phase_(phase) {}

  void run(ggml_tensor* dst, int ith, int nth) override {
    const ggml_tensor* x = dst->src[0];
    phase_({.head = op_.head,
            .screen = op_.screen,
            .queries = op_.queries,
            .n_rows = x->ne[1],
            .x = floats(x),
            .workspace = op_.workspace,
            .next_chunk = &next_chunk_},
           ith, nth);
  }

 private:
  HeadOp op_;
  HeadPhase phase_;
};

}  // namespace

Tensor linear_node(GraphBuilder& g, const LinearOp& op, Tensor x, Tensor residual) {
  std::int64_t n_out = 0;
  for (Tensor weight : op.weights) {
    expect_shape(weight, weight->name, {x->ne[0], -1});
    n_out = op.epilogue == Epilogue::kSwiGlu ? weight->ne[1] : n_out + weight->ne[1];
  }
  auto node = std::make_unique<LinearNode>(op, residual != nullptr);
  if (!residual) return g.custom(std::move(node), n_out, x->ne[1], {x});
  expect_shape(residual, residual->name, {n_out, x->ne[1]});
  return g.custom(std::move(node), n_out, x->ne[1], {x, residual});
}

Tensor rope_store_node(GraphBuilder& g, const AttentionOp& op, Tensor qkv) {
  expect_shape(qkv, "qkv", {(op.n_head + 2 * op.kv.n_head_kv) * op.kv.head_dim, -1});
  return g.custom_inplace(std::make_unique<RopeStoreNode>(op), qkv);
}

Tensor attention_node(GraphBuilder& g, const AttentionOp& op, Tensor qkv) {
  return g.custom(std::make_unique<AttentionNode>(op), op.n_head * op.kv.head_dim, qkv->ne[1],
                  {qkv});
}

Tensor certified_head_node(GraphBuilder& g, const HeadOp& op, Tensor x) {
  expect_shape(x, "head input", {op.head->n_embd, -1});
  Tensor screened = g.custom(std::make_unique<HeadNode>(op, head_screen), 1, 1, {x});
  return g.custom(std::make_unique<HeadNode>(op, head_refine), 1, 1, {x, screened});
}

}  // namespace modularbase::kernels
