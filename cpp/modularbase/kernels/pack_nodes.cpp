#include "modularbase/kernels/pack_nodes.h"

#include "modularbase/kernels/pack_steps.h"
#include "modularbase/kernels/site_node.h"

namespace modularbase::kernels {
namespace {

class InNode final : public SiteNode {
 public:
  using SiteNode::SiteNode;
  void run(ggml_tensor* dst, int, int nth) override {
    site_in(call(nth), floats(dst->src[0]), floats(dst));
  }
};

/// W_in x -> z, in place; routes.
class RouteNode final : public SiteNode {
 public:
  using SiteNode::SiteNode;
  void run(ggml_tensor* dst, int ith, int nth) override {
    pack_route({.weights = &site_,
                .uses = &step_.uses,
                .x = floats(dst->src[1]),
                .z = floats(dst),
                .routes = &step_.routes},
               ith, nth);
  }
};

class ExpertUpNode final : public SiteNode {
 public:
  using SiteNode::SiteNode;
  void run(ggml_tensor* dst, int, int nth) override {
    site_expert_up(call(nth), step_.routes, floats(dst->src[0]), floats(dst));
  }
};

class ExpertDownNode final : public SiteNode {
 public:
  using SiteNode::SiteNode;
  void run(ggml_tensor* dst, int, int nth) override {
    site_expert_down(call(nth), step_.routes, floats(dst->src[0]), floats(dst));
  }
};

class MixNode final : public SiteNode {
 public:
  using SiteNode::SiteNode;
  void run(ggml_tensor* dst, int ith, int nth) override {
    const std::int64_t n_uses = dst->ne[1];
    site_mix(site_, step_.routes, floats(dst->src[0]), floats(dst->src[1]), n_uses * ith / nth,
             n_uses * (ith + 1) / nth, floats(dst));
  }
};

class OutNode final : public SiteNode {
 public:
  using SiteNode::SiteNode;
  void run(ggml_tensor* dst, int, int nth) override {
    site_out(call(nth), floats(dst->src[0]), floats(dst));
  }
};

class MergeNode final : public CustomNode {
 public:
  MergeNode(const std::vector<PoolDelta>& pools, const PackShares& shares, int layer)
      : pools_(pools), shares_(shares), layer_(layer) {}

  void run(ggml_tensor* dst, int ith, int nth) override {
    std::vector<PackDeltas> deltas;
    deltas.reserve(pools_.size());
    for (const PoolDelta& pool : pools_) {
      deltas.push_back(
          {pool.delta ? floats(pool.delta) : nullptr, pool.step->routes.factors.data()});
    }
    pack_merge({.shares = &shares_,
                .pools = deltas,
                .n_embd = dst->ne[0],
                .layer = layer_,
                .h = floats(dst->src[0]),
                .out = floats(dst)},
               ith, nth);
  }

 private:
  const std::vector<PoolDelta> pools_;
  const PackShares& shares_;
  const int layer_;
};

}  // namespace

Tensor pack_delta_node(GraphBuilder& g, const SiteWeights& site, PackPoolStep& step,
                       std::int64_t n_uses, Tensor x) {
  expect_shape(x, "a site's input", {site.in->ne[0], -1});
  const std::int64_t d_inner = site.in->ne[1], d_ff = site.expert_gate->ne[1];
  const std::int64_t n_choices = site.n_expert_used * n_uses;
  const auto node = [&]<class Node>(std::int64_t ne0, std::int64_t ne1,
                                    const std::vector<Tensor>& sources) {
    return g.custom(std::make_unique<Node>(site, step), ne0, ne1, sources);
  };
  Tensor z = node.template operator()<InNode>(d_inner, n_uses, {x});
  z = g.custom_inplace(std::make_unique<RouteNode>(site, step), z, {x});
  Tensor hidden = node.template operator()<ExpertUpNode>(d_ff, n_choices, {z});
  Tensor parts = node.template operator()<ExpertDownNode>(d_inner, n_choices, {hidden});
  Tensor y = node.template operator()<MixNode>(d_inner, n_uses, {z, parts});
  return node.template operator()<OutNode>(site.out->ne[1], n_uses, {y});
}

Tensor pack_merge_node(GraphBuilder& g, const std::vector<PoolDelta>& pools,
                       const PackShares& shares, Tensor h, int layer) {
  std::vector<Tensor> sources{h};
  for (const PoolDelta& pool : pools) {
    if (pool.delta) sources.push_back(pool.delta);
  }
  return g.custom(std::make_unique<MergeNode>(pools, shares, layer), h->ne[0], h->ne[1], sources);
}

}  // namespace modularbase::kernels
