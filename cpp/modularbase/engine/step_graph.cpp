#include "modularbase/engine/step_graph.h"

#include "modularbase/kernels/logprob.h"

namespace modularbase {
namespace {

// The reference attention is some 45 nodes a layer and up to 35 for each of two tiers, the fused
// one 8; a site 7, or in ggml's ops some 70 and two an expert in use.
std::size_t max_nodes(const GraphKey& key, const GraphParts& parts) {
  std::size_t per_layer = parts.attention_path == KernelPath::kReference ? 192 : 64;
  for (const PackPoolKey& pack : key.packs) {
    const auto n_used = static_cast<std::size_t>(pack.pool->geometry().n_expert_used);
    per_layer += parts.site_path == KernelPath::kReference ? 96 + 2 * n_used : 10;
  }
  return parts.model->layers.size() * per_layer + 64;
}

}  // namespace

StepGraph::StepGraph(const GraphKey& graph_key, const GraphParts& parts, const Backend& backend)
    : key(graph_key), graph(max_nodes(graph_key, parts)) {
  build(parts);
  graph.allocate(backend);
}

void StepGraph::add_attention(GraphBuilder& g, const GraphParts& parts) {
  const Model& model = *parts.model;
  if (parts.attention_path == KernelPath::kFused) {
    std::vector<FusedInputs> groups{parts.lower->fused()};
    if (parts.upper) groups.push_back(parts.upper->fused());
    attention_ = std::make_unique<FusedAttention>(model.config, std::move(groups));
    return;
  }
  const auto inputs = [&](const KvGroup& group, std::int64_t n_rows) {
    return add_reference_inputs(g, group, model.config.n_head, n_rows, key.attention);
  };
  lower_reference = inputs(parts.lower->group(), key.n_rows);
  std::vector<ReferenceInputs> groups{lower_reference};
  if (parts.upper) {
    upper_reference = inputs(parts.upper->group(), key.n_rows + key.n_mid_rows);
    groups.push_back(upper_reference);
  }
  auto reference =
      std::make_unique<ReferenceAttention>(model.config, model.rope_factors, std::move(groups));
  reference_attention = reference.get();
  attention_ = std::move(reference);
}

void StepGraph::add_mid(GraphBuilder& g, const GraphParts& parts) {
  mid = MidRows{parts.split, parts.mid_store, nullptr, nullptr};
  if (key.n_rows > 0) mid->write_ids = g.input("mid_write_ids", GGML_TYPE_I64, key.n_rows);
  if (key.n_mid_rows > 0) mid->read_ids = g.input("mid_read_ids", GGML_TYPE_I32, key.n_mid_rows);
}

void StepGraph::add_sites(const GraphParts& parts) {
  if (key.packs.empty()) return;
  const RowScopes scopes{
      .split = mid ? mid->layer : 0,
      .cut_layer = out_rows ? static_cast<int>(parts.model->layers.size()) - 1 : -1};
  if (parts.site_path == KernelPath::kFused) {
    sites_ = std::make_unique<FusedPackSites>(*parts.packs, key.packs, scopes);
    return;
  }
  auto reference = std::make_unique<ReferencePackSites>(*parts.packs, key.packs, scopes);
  reference_sites = reference.get();
  sites_ = std::move(reference);
}

ForwardArgs StepGraph::add_inputs(GraphBuilder& g, const GraphParts& parts) {
  if (key.n_rows > 0) token_ids = g.input("token_ids", GGML_TYPE_I32, key.n_rows);
  if (key.n_out != key.n_rows + key.n_mid_rows && key.n_out > 0) {
    out_rows = g.input("out_rows", GGML_TYPE_I32, key.n_out);
  }
  add_attention(g, parts);
  if (parts.mid_store) add_mid(g, parts);
  add_sites(parts);
  tap.layer = key.tap_layer;
  return {.linear_path = parts.linear_path,
          .attention = attention_.get(),
          .hook = sites_.get(),
          .mid = mid ? &*mid : nullptr,
          .tap = &tap,
          .token_ids = token_ids,
          .out_rows = out_rows,
          .keeps_queries = key.keeps_queries};
}

void StepGraph::build(const GraphParts& parts) {
  GraphBuilder g(graph);
  const Model& model = *parts.model;
  if (key.end == GraphEnd::kHeadOnly) {
    head_input = g.input("head_input", GGML_TYPE_F32, model.config.n_embd, key.n_out);
    logits = g.output(build_linear(g, parts.linear_path, {model.output}, head_input), "logits");
    return;
  }
  const ForwardArgs args = add_inputs(g, parts);
  if (key.end == GraphEnd::kCacheOnly) {
    model.build_cache_only(g, args);
  } else if (key.end == GraphEnd::kHidden) {
    const bool after_norm = key.hidden_layer > model.config.n_layer;
    hidden = g.output(
        after_norm ? model.build_normed(g, args) : model.build_hidden(g, args, key.hidden_layer),
        "hidden");
  } else {
    build_end(g, parts, args);
  }
}

void StepGraph::build_end(GraphBuilder& g, const GraphParts& parts, const ForwardArgs& args) {
  normed = g.output(parts.model->build_normed(g, args), "result_norm");
  if (key.end == GraphEnd::kShortlist) {
    g.expand(kernels::certified_head_node(g, parts.head, normed));
    return;
  }
  Tensor product = build_linear(g, parts.linear_path, {parts.model->output}, normed);
  if (key.end == GraphEnd::kLogits) {
    logits = g.output(product, "logits");
    return;
  }
  targets = g.input("targets", GGML_TYPE_I32, key.n_out);
  const auto target_logprobs = parts.linear_path == KernelPath::kFused
                                   ? kernels::target_logprob_node
                                   : kernels::target_logprob_reference;
  logprobs = g.output(target_logprobs(g, product, targets), "logprobs");
}

}  // namespace modularbase
