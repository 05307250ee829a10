#include "modularbase/models/model.h"

namespace modularbase {
namespace {

/// h + attention(h) of one layer, on all rows or on out_rows only.
Tensor build_attention(GraphBuilder& g, const Model& model, const ForwardArgs& args, Tensor h,
                       Tensor out_rows, int layer) {
  const Attention& attention = model.layers[static_cast<std::size_t>(layer)].attention;
  const float eps = model.config.norm_eps;
  Tensor stored = attention.build_store(g, args.linear_path, *args.attention, h, eps, layer);
  return attention.build_attend(g, args.linear_path, *args.attention, stored, h, out_rows, layer);
}

/// h + FFN(h) of one layer, and what the hook adds.
Tensor build_feed_forward(GraphBuilder& g, const Model& model, const ForwardArgs& args, Tensor h,
                          int layer) {
  const FeedForward& feed_forward = model.layers[static_cast<std::size_t>(layer)].feed_forward;
  const auto [x, out] = feed_forward.build(g, args.linear_path, h, model.config.norm_eps, layer);
  return args.hook ? args.hook->after_ffn(g, x, out, layer) : out;
}

/// Keeps h [n_embd, n_rows], and sets the rows that restart behind it.
Tensor build_mid(GraphBuilder& g, const MidRows& mid, Tensor h) {
  g.expand(ggml_set_rows(g.ctx(), mid.store, h, mid.write_ids));
  if (!mid.read_ids) return h;
  return ggml_concat(g.ctx(), h, g.get_rows(mid.store, mid.read_ids), 1);
}

/// A copy, since what comes later may write over h.
void build_tap(GraphBuilder& g, const ForwardArgs& args, Tensor h, int layer) {
  if (!args.tap || args.tap->layer != layer) return;
  args.tap->rows = g.output(ggml_cont(g.ctx(), h), "tapped");
}

Tensor build_layer(GraphBuilder& g, const Model& model, const ForwardArgs& args, Tensor h,
                   Tensor out_rows, int layer) {
  h = build_attention(g, model, args, h, out_rows, layer);
  if (args.mid && args.mid->layer == layer) h = build_mid(g, *args.mid, h);
  return build_feed_forward(g, model, args, h, layer);
}

}  // namespace

Tensor Model::build_hidden(GraphBuilder& g, const ForwardArgs& args, int layer) const {
  int il = 0;
  Tensor h = nullptr;
  if (args.token_ids) {
    h = g.get_rows(token_embd, args.token_ids);
  } else {
    h = g.get_rows(args.mid->store, args.mid->read_ids);
    h = build_feed_forward(g, *this, args, h, args.mid->layer);
    il = args.mid->layer + 1;
  }
  for (; il < layer; ++il) {
    build_tap(g, args, h, il);
    h = build_layer(g, *this, args, h, nullptr, il);
  }
  build_tap(g, args, h, layer);
  return h;
}

Tensor Model::build_normed(GraphBuilder& g, const ForwardArgs& args) const {
  const int last = static_cast<int>(layers.size()) - 1;
  Tensor h = build_hidden(g, args, last);
  h = build_layer(g, *this, args, h, args.out_rows, last);
  return g.rms_norm(h, output_norm, config.norm_eps);
}

void Model::build_cache_only(GraphBuilder& g, const ForwardArgs& args) const {
  const int last = static_cast<int>(layers.size()) - 1;
  Tensor h = build_hidden(g, args, last);
  const Attention& attention = layers.back().attention;
  Tensor stored =
      attention.build_store(g, args.linear_path, *args.attention, h, config.norm_eps, last);
  g.expand(args.keeps_queries ? args.attention->attend(g, stored, last) : stored);
}

}  // namespace modularbase
