#include "modularbase/models/reference_attention.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <utility>

namespace modularbase {
namespace {

constexpr std::int64_t kBlock = kernels::kBlockTokens;

// H x for runs of numbers as long as H is wide; the shape stays.
Tensor hadamard(GraphBuilder& g, Tensor matrix, Tensor x) {
  ggml_context* ctx = g.ctx();
  const std::int64_t n = matrix->ne[0];
  Tensor whole = ggml_is_contiguous(x) ? x : ggml_cont(ctx, x);
  Tensor runs = ggml_reshape_2d(ctx, whole, n, ggml_nelements(x) / n);
  Tensor rotated = ggml_mul_mat(ctx, matrix, runs);
  ggml_mul_mat_set_hint(rotated, GGML_HINT_SRC0_IS_HADAMARD);
  return ggml_reshape_4d(ctx, rotated, x->ne[0], x->ne[1], x->ne[2], x->ne[3]);
}

// [head_dim, n, n_head_kv] . [head_dim, n_rows, n_head] -> [n, n_rows, n_head]
Tensor dot(GraphBuilder& g, Tensor keys, Tensor q) {
  Tensor scores = ggml_mul_mat(g.ctx(), keys, q);
  ggml_prec_set_acc(scores, GGML_PREC_F32);
  return scores;
}

Tensor joined(GraphBuilder& g, Tensor a, Tensor b, int dim) {
  return a ? ggml_concat(g.ctx(), a, b, dim) : b;
}

Tensor sum(GraphBuilder& g, Tensor a, Tensor b) {
  return a ? ggml_add(g.ctx(), a, b) : b;
}

// Matrices [first, first + n) of x [n0, n1, n2].
Tensor matrices(GraphBuilder& g, Tensor x, std::int64_t first, std::int64_t n) {
  return ggml_view_3d(g.ctx(), x, x->ne[0], x->ne[1], n, x->nb[1], x->nb[2],
                      static_cast<std::size_t>(first) * x->nb[2]);
}

constexpr float kUnseen = -1e30f;  // a score; finite, as 0 times it must be 0

}  // namespace

ReferenceAttention::ReferenceAttention(const ModelConfig& config, Tensor rope_factors,
                                       std::vector<ReferenceInputs> groups)
    : config_(config),
      rope_factors_(rope_factors),
      groups_(std::move(groups)),
      scale_(1.0f / std::sqrt(static_cast<float>(config.head_dim))) {}

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
  if (inputs.group->memory().geometry().type == GGML_TYPE_Q8_0) k = hadamard(g, inputs.hadamard, k);
  k_rows_ = write(g, inputs, inputs.group->memory().k(layer), k);
  v_rows_ = write(g, inputs, inputs.group->memory().v(layer), v);
  return rotate(g, inputs, heads(g, qkv, 0, n_head), q_norm);
}

Tensor ReferenceAttention::read(GraphBuilder& g, const ReferenceInputs& inputs,
                                Tensor cache_rows) const {
  Tensor rows = ggml_get_rows(g.ctx(), cache_rows, inputs.read_rows);
  return ggml_reshape_3d(g.ctx(), rows, config_.head_dim, inputs.mask->ne[0], config_.n_head_kv);
}

ReferenceAttention::Segment ReferenceAttention::exact(GraphBuilder& g,
                                                      const ReferenceInputs& inputs,
                                                      Tensor q) const {
  if (k_rows_->type == GGML_TYPE_Q8_0) q = hadamard(g, inputs.hadamard, q);
  return {dot(g, read(g, inputs, k_rows_), q), inputs.mask, read(g, inputs, v_rows_), false};
}

// The weights of slots are the same for all rows and all query heads of a kv head. The softmax
// multiplies what it gets by the scale.
Tensor ReferenceAttention::add_log_weights(GraphBuilder& g, const ReferenceTier& tier,
                                           const TileTables& tables, Tensor scores) const {
  ggml_context* ctx = g.ctx();
  const std::int64_t n = scores->ne[0];
  Tensor weights = ggml_get_rows(ctx, tables.log_weight, tier.blocks);  // [64, n_blocks, n_tiles]
  const std::int64_t n_tiles = weights->ne[2];
  weights = ggml_scale(ctx, weights, 1.0f / scale_);
  weights = ggml_reshape_4d(ctx, weights, n, 1, 1, n_tiles);
  const std::int64_t group = scores->ne[2] / n_tiles;
  Tensor by_tile = ggml_reshape_4d(ctx, scores, n, scores->ne[1], group, n_tiles);
  return ggml_reshape_3d(ctx, ggml_add(ctx, by_tile, weights), n, scores->ne[1], group * n_tiles);
}

ReferenceAttention::Segment ReferenceAttention::tier(GraphBuilder& g, const ReferenceInputs& inputs,
                                                     const ReferenceTier& tier,
                                                     const TileTables& tables, Tensor q) const {
  ggml_context* ctx = g.ctx();
  const std::int64_t head_dim = config_.head_dim;
  const std::int64_t n_blocks = tier.blocks->ne[0];
  const std::int64_t n_tiles = tables.k->ne[2];
  ReferenceTier own = tier;  // the blocks of each head with tiles
  own.blocks = ggml_view_2d(ctx, tier.blocks, n_blocks, n_tiles, tier.blocks->nb[1], 0);
  Tensor keys = ggml_get_rows(ctx, tables.k, own.blocks);  // [64 * head_dim, n_blocks, n_tiles]
  if (tables.k_mean) {
    Tensor mean = ggml_get_rows(ctx, tables.k_mean, own.blocks);
    mean = hadamard(g, inputs.hadamard, mean);  // [head_dim, n_blocks, n_tiles]
    keys = ggml_add(ctx, ggml_reshape_4d(ctx, keys, head_dim, kBlock, n_blocks, n_tiles),
                    ggml_reshape_4d(ctx, mean, head_dim, 1, n_blocks, n_tiles));
  }
  q = queries_of(g, tables, q);
  if (ggml_is_quantized(tables.k->type)) q = hadamard(g, inputs.hadamard, q);
  const auto by_tile = [&](Tensor rows) {
    return ggml_reshape_3d(ctx, rows, head_dim, kBlock * n_blocks, n_tiles);
  };
  Tensor scores = dot(g, by_tile(keys), q);
  if (tables.log_weight) scores = add_log_weights(g, own, tables, scores);
  Tensor values = by_tile(ggml_get_rows(ctx, tables.v, own.blocks));
  return spread(g, tables, {scores, tier.mask, values, tables.v->type == GGML_TYPE_Q4_0});
}

// Of q [head_dim, n_rows, n_head], the heads whose keys have tiles.
Tensor ReferenceAttention::queries_of(GraphBuilder& g, const TileTables& tables, Tensor q) const {
  const std::int64_t n_head_kv = config_.n_head_kv;
  if (tables.k->ne[2] == n_head_kv) return q;
  const std::int64_t group = config_.n_head / n_head_kv;
  Tensor own = nullptr;
  for (std::int64_t head = 0; head < n_head_kv; ++head) {
    if (tables.tiles[head] >= 0) own = joined(g, own, matrices(g, q, head * group, group), 2);
  }
  return own;
}

// From heads with tiles to all heads. The others see nothing there: their scores are kUnseen, and
// what their weights of 0 meet are some other head's values.
ReferenceAttention::Segment ReferenceAttention::spread(GraphBuilder& g, const TileTables& tables,
                                                       Segment of_tiles) const {
  const std::int64_t n_head_kv = config_.n_head_kv;
  if (tables.k->ne[2] == n_head_kv) return of_tiles;
  const std::int64_t group = config_.n_head / n_head_kv;
  Segment all{nullptr, of_tiles.mask, nullptr, of_tiles.is_rotated};
  for (std::int64_t head = 0; head < n_head_kv; ++head) {
    const std::int64_t tile = std::max(tables.tiles[head], std::int32_t{0});
    Tensor scores = matrices(g, of_tiles.scores, tile * group, group);
    if (tables.tiles[head] < 0) {
      scores = ggml_scale_bias(g.ctx(), ggml_cont(g.ctx(), scores), 0.0f, kUnseen);
    }
    all.scores = joined(g, all.scores, scores, 2);
    all.values = joined(g, all.values, matrices(g, of_tiles.values, tile, 1), 2);
  }
  return all;
}

// One tensor for all layers with the same segments.
Tensor ReferenceAttention::mask_of(GraphBuilder& g, const std::vector<Segment>& segments) {
  std::vector<Tensor> parts;
  parts.reserve(segments.size());
  for (const Segment& segment : segments) parts.push_back(segment.mask);
  Tensor& mask = masks_[parts];
  if (mask) return mask;
  for (const Tensor part : parts) mask = joined(g, mask, part, 0);
  return mask;
}

// weights [n, n_rows, n_head] of all segments -> [head_dim, n_rows, n_head]
Tensor ReferenceAttention::mix(GraphBuilder& g, const ReferenceInputs& inputs,
                               const std::vector<Segment>& segments, Tensor weights) const {
  ggml_context* ctx = g.ctx();
  Tensor plain = nullptr;
  Tensor rotated = nullptr;
  std::int64_t first = 0;
  for (const Segment& segment : segments) {
    const std::int64_t n = segment.scores->ne[0];
    Tensor own = weights;
    if (n != weights->ne[0]) {
      own = ggml_cont(
          ctx, ggml_view_3d(ctx, weights, n, weights->ne[1], weights->ne[2], weights->nb[1],
                            weights->nb[2], static_cast<std::size_t>(first) * sizeof(float)));
    }
    first += n;
    Tensor values =
        ggml_cont(ctx, ggml_transpose(ctx, segment.values));  // [n, head_dim, n_head_kv]
    Tensor& out = segment.is_rotated ? rotated : plain;
    out = sum(g, out, ggml_mul_mat(ctx, values, own));
  }
  return rotated ? sum(g, plain, hadamard(g, inputs.hadamard, rotated)) : plain;
}

// ln sum exp(s) = sum p (s - ln p): no term is lost to the largest, whichever that is.
void ReferenceAttention::keep_queries(GraphBuilder& g, const ReferenceInputs& inputs, Tensor q,
                                      Tensor scores, Tensor weights, int layer) {
  ggml_context* ctx = g.ctx();
  const std::int64_t n_window = inputs.window_rows->ne[0];
  Tensor rows = ggml_view_1d(ctx, inputs.window_rows, n_window, 0);
  Tensor flat = ggml_reshape_2d(ctx, q, q->ne[0] * q->ne[1], q->ne[2]);
  Tensor queries = g.output(ggml_get_rows(ctx, flat, rows), "window_queries");
  Tensor p = ggml_get_rows(ctx, weights, inputs.window_rows);  // [n, n_window, n_head]
  Tensor s = ggml_scale(ctx, ggml_get_rows(ctx, scores, inputs.window_rows), scale_);
  Tensor log_p = ggml_log(ctx, ggml_clamp(ctx, ggml_cont(ctx, p), FLT_MIN, 1.0f));
  Tensor mass = ggml_sum_rows(ctx, ggml_mul(ctx, p, ggml_sub(ctx, s, log_p)));
  queries_.push_back({layer, queries, g.output(mass, "window_log_mass")});
}

Tensor ReferenceAttention::attend(GraphBuilder& g, Tensor q, int layer) {
  const ReferenceInputs& inputs = inputs_of(groups_, layer);
  ggml_context* ctx = g.ctx();
  const std::int64_t n_rows = q->ne[2];
  Tensor by_head = ggml_permute(ctx, q, 0, 2, 1, 3);  // [head_dim, n_rows, n_head]
  std::vector<Segment> segments{exact(g, inputs, by_head)};
  for (int i = 0; i < kernels::kNKvTiers; ++i) {
    const TileTables tables = inputs.group->tables(static_cast<kernels::KvTier>(i), layer);
    if (!inputs.tiers[i].blocks || !tables.k) continue;
    segments.push_back(tier(g, inputs, inputs.tiers[i], tables, by_head));
  }
  Tensor scores = nullptr;  // [n, n_rows, n_head]
  for (const Segment& segment : segments) scores = joined(g, scores, segment.scores, 0);
  Tensor weights = ggml_soft_max_ext(ctx, scores, mask_of(g, segments), scale_, 0.0f);
  if (inputs.window_rows) keep_queries(g, inputs, q, scores, weights, layer);
  Tensor out = mix(g, inputs, segments, weights);            // [head_dim, n_rows, n_head]
  out = ggml_cont(ctx, ggml_permute(ctx, out, 0, 2, 1, 3));  // [head_dim, n_head, n_rows]
  return ggml_reshape_2d(ctx, out, config_.n_head * config_.head_dim, n_rows);
}

}  // namespace modularbase
