#include "modularbase/adapters/pack_site.h"

#include <algorithm>

namespace modularbase {
namespace {

const SiteWeights* site_at(const SlotPool& pool, int layer) {
  const int site = pool.site_of_layer(layer);
  return site < 0 ? nullptr : &pool.site(static_cast<std::size_t>(site));
}

/// The router of section 3: T = the n_expert_used largest of softmax(W_gate z), and their gains.
struct Choice {
  Tensor experts;  // I32 [n_expert_used, n]: numbers of matrices
  Tensor gains;    // [1, n_expert_used, n]
};

/// Every pair's product with its slot's matrix: [n_in, n_out, S], [n_in, n], I32 [n] ->
/// [n_out, 1, n]. A row's pairs are rows of their own here: in padding the same slot comes twice,
/// and ggml's CUDA takes the matrices of one row to differ.
Tensor build_products(ggml_context* ctx, Tensor matrices, Tensor pairs, Tensor slots) {
  const std::int64_t n = slots->ne[0];
  return ggml_mul_mat_id(ctx, matrices, ggml_reshape_3d(ctx, pairs, matrices->ne[0], 1, n),
                         ggml_reshape_2d(ctx, slots, 1, n));
}

Choice build_router(ggml_context* ctx, const SiteWeights& site, Tensor z, Tensor slots) {
  const std::int64_t n_expert = site.router->ne[1], n = slots->ne[0];
  const int n_used = static_cast<int>(site.n_expert_used);
  Tensor r = build_products(ctx, site.router, z, slots);
  r = ggml_soft_max(ctx, ggml_reshape_2d(ctx, r, n_expert, n));
  Tensor chosen = ggml_argsort_top_k(ctx, r, n_used);  // [n_expert_used, n]
  Tensor gains = ggml_get_rows(ctx, ggml_reshape_3d(ctx, r, 1, n_expert, n), chosen);
  gains = ggml_reshape_2d(ctx, gains, n_used, n);
  gains = ggml_div(ctx, gains, ggml_sum_rows(ctx, gains));
  Tensor numbers = ggml_get_rows(ctx, site.expert_ids, slots);  // [n_expert, n]
  numbers = ggml_get_rows(ctx, ggml_reshape_3d(ctx, numbers, 1, n_expert, n), chosen);
  return {ggml_reshape_2d(ctx, numbers, n_used, n), ggml_reshape_3d(ctx, gains, 1, n_used, n)};
}

/// Sum over the second of three dimensions: [ne0, n, ne2] -> [ne0, ne2].
Tensor sum_middle(ggml_context* ctx, Tensor t) {
  Tensor sum = nullptr;
  for (std::int64_t i = 0; i < t->ne[1]; ++i) {
    Tensor part =
        ggml_view_2d(ctx, t, t->ne[0], t->ne[2], t->nb[2], static_cast<std::size_t>(i) * t->nb[1]);
    sum = sum ? ggml_add(ctx, sum, part) : ggml_cont(ctx, part);
  }
  return sum;
}

/// sum over the chosen experts of g_e W_down,e(silu(W_gate,e z) * (W_up,e z)): [d_inner, n].
Tensor build_experts(ggml_context* ctx, const SiteWeights& site, Tensor z, const Choice& choice) {
  const std::int64_t d_inner = site.router->ne[0], n = choice.experts->ne[1];
  Tensor rows = ggml_reshape_3d(ctx, z, d_inner, 1, n);
  Tensor hidden =
      ggml_swiglu_split(ctx, ggml_mul_mat_id(ctx, site.expert_gate, rows, choice.experts),
                        ggml_mul_mat_id(ctx, site.expert_up, rows, choice.experts));
  Tensor parts = ggml_mul_mat_id(ctx, site.expert_down, hidden, choice.experts);
  return sum_middle(ctx, ggml_mul(ctx, parts, choice.gains));
}

/// weight * 2 sigmoid(v . x + b): [1, n_per_row, n_rows].
Tensor build_amounts(ggml_context* ctx, const SiteWeights& site, Tensor x3, Tensor slots,
                     Tensor weights, std::int64_t n_per_row) {
  const std::int64_t n_embd = x3->ne[0], n_rows = x3->ne[2];
  Tensor v = ggml_get_rows(ctx, site.token_gate, slots);
  v = ggml_mul(ctx, ggml_reshape_3d(ctx, v, n_embd, n_per_row, n_rows), x3);
  Tensor bias = ggml_get_rows(ctx, site.token_bias, slots);
  Tensor gate =
      ggml_add(ctx, ggml_sum_rows(ctx, v), ggml_reshape_3d(ctx, bias, 1, n_per_row, n_rows));
  gate = ggml_scale(ctx, ggml_sigmoid(ctx, gate), 2.0f);
  return ggml_mul(ctx, gate, ggml_reshape_3d(ctx, weights, 1, n_per_row, n_rows));
}

}  // namespace

Tensor build_site(GraphBuilder& g, const SiteWeights& site, Tensor x, Tensor slots,
                  Tensor weights) {
  ggml_context* ctx = g.ctx();
  const std::int64_t n_embd = site.in->ne[0], d_inner = site.in->ne[1];
  expect_shape(x, "a site's input", {n_embd, -1});
  const std::int64_t n_rows = x->ne[1], n = slots->ne[0], n_per_row = n / n_rows;
  Tensor x3 = ggml_reshape_3d(ctx, x, n_embd, 1, n_rows);
  Tensor pairs = ggml_repeat_4d(ctx, x3, n_embd, n_per_row, n_rows, 1);
  Tensor z = build_products(ctx, site.in, pairs, slots);
  z = ggml_rms_norm(ctx, ggml_reshape_2d(ctx, z, d_inner, n), site.norm_eps);
  z = ggml_mul(ctx, z, ggml_get_rows(ctx, site.norm, slots));  // [d_inner, n]
  const Choice choice = build_router(ctx, site, z, slots);
  Tensor y = ggml_add(ctx, z, build_experts(ctx, site, z, choice));
  Tensor deltas = build_products(ctx, site.out, y, slots);
  deltas = ggml_reshape_3d(ctx, deltas, n_embd, n_per_row, n_rows);
  Tensor amounts = build_amounts(ctx, site, x3, slots, weights, n_per_row);
  return sum_middle(ctx, ggml_mul(ctx, deltas, amounts));
}

Tensor FusedPackSites::after_ffn(GraphBuilder& g, Tensor x, Tensor h, int layer) {
  const RowScope scope = scopes_.of(layer);
  PackRows& rows = batch_.rows(scope);
  std::vector<kernels::PoolDelta> deltas;
  bool any = false;
  for (std::size_t i = 0; i < pools_.size(); ++i) {
    const std::int64_t n_uses = pools_[i].n_uses[static_cast<std::size_t>(scope)];
    const SiteWeights* site = site_at(*pools_[i].pool, layer);
    if (!site || n_uses == 0) {
      deltas.push_back({nullptr, &rows.step(i)});
    } else if (n_uses <= kernels::kFewUses && !pools_[i].has_pairs) {
      h = kernels::pack_add_few_node(g, *site, rows.step(i), n_uses, x, h);
      deltas.push_back({nullptr, &rows.step(i)});
    } else {
      deltas.push_back(
          {kernels::pack_delta_node(g, *site, rows.step(i), n_uses, x), &rows.step(i)});
      any = true;
    }
  }
  return any ? kernels::pack_merge_node(g, deltas, rows.shares(), h, layer) : h;
}

Tensor ReferencePackSites::after_ffn(GraphBuilder& g, Tensor x, Tensor h, int layer) {
  const RowScope scope = scopes_.of(layer);
  for (std::size_t i = 0; i < pools_.size(); ++i) {
    const std::int64_t n = pools_[i].n_uses[static_cast<std::size_t>(scope)];
    const SiteWeights* site = site_at(*pools_[i].pool, layer);
    if (!site || n == 0) continue;
    const Inputs& inputs = inputs_for(g, i, n, scope);
    h = g.add(h, build_site(g, *site, x, inputs.slots, inputs.weights));
  }
  return h;
}

const ReferencePackSites::Inputs& ReferencePackSites::inputs_for(GraphBuilder& g, std::size_t pool,
                                                                 std::int64_t n, RowScope scope) {
  PackRows* rows = &batch_.rows(scope);
  const auto known = std::ranges::find_if(
      inputs_, [&](const Inputs& inputs) { return inputs.pool == pool && inputs.rows == rows; });
  if (known != inputs_.end()) return *known;
  inputs_.push_back({pool, rows, g.input("pack_slots", GGML_TYPE_I32, n),
                     g.input("pack_weights", GGML_TYPE_F32, n)});
  return inputs_.back();
}

void ReferencePackSites::fill_inputs() {
  std::vector<std::int32_t> slots;
  std::vector<float> weights;
  for (const Inputs& inputs : inputs_) {
    inputs.rows->fill_padded(inputs.pool, slots, weights);
    ggml_backend_tensor_set(inputs.slots, slots.data(), 0, ggml_nbytes(inputs.slots));
    ggml_backend_tensor_set(inputs.weights, weights.data(), 0, ggml_nbytes(inputs.weights));
  }
}

}  // namespace modularbase
