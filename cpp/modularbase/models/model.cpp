#include "modularbase/models/model.h"

namespace modularbase {
namespace {

/// One layer on all rows, or on out_rows only after its attention.
Tensor build_layer(GraphBuilder& g, const Model& model, const ForwardArgs& args, Tensor h,
                   Tensor out_rows, int layer) {
  const Layer& block = model.layers[static_cast<std::size_t>(layer)];
  const float eps = model.config.norm_eps;
  Tensor stored = block.attention.build_store(g, args.linear_path, *args.attention, h, eps, layer);
  h = block.attention.build_attend(g, args.linear_path, *args.attention, stored, h, out_rows,
                                   layer);
  const auto [x, out] = block.feed_forward.build(g, args.linear_path, h, eps, layer);
  return args.hook ? args.hook->after_ffn(g, x, out, layer) : out;
}

}  // namespace

Tensor Model::build_hidden(GraphBuilder& g, const ForwardArgs& args, int layer) const {
  Tensor h = g.get_rows(token_embd, args.token_ids);
  for (int il = 0; il < layer; ++il) h = build_layer(g, *this, args, h, nullptr, il);
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
  g.expand(attention.build_store(g, args.linear_path, *args.attention, h, config.norm_eps, last));
}

}  // namespace modularbase
