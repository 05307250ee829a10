// A site of few rows: what is small is done by every thread for itself, so that they meet less.
#include <algorithm>

#include "modularbase/kernels/site_node.h"

namespace modularbase::kernels {
namespace {

/// x -> W_in x [d_inner, n_uses]
class InNode final : public SiteNode {
 public:
  using SiteNode::SiteNode;
  void run(ggml_tensor* dst, int, int nth) override {
    site_in(call(nth), floats(dst->src[0]), floats(dst));
  }
};

/// W_in x, x -> one row: hidden [d_ff, n_expert_used, n_uses], then z [d_inner, n_uses]. Every
/// thread routes for itself; the first one's routes and z are kept for the nodes that follow.
class RouteUpNode final : public SiteNode {
 public:
  using SiteNode::SiteNode;
  void run(ggml_tensor* dst, int ith, int nth) override {
    thread_local std::vector<float> z;
    thread_local PackRoutes routes;
    const ggml_tensor* raw = dst->src[0];
    const std::int64_t n_z = ggml_nelements(raw);
    z.assign(floats(dst->src[0]), floats(dst->src[0]) + n_z);
    routes.resize(raw->ne[1], site_.n_expert_used);
    pack_route({.weights = &site_,
                .uses = &step_.uses,
                .x = floats(dst->src[1]),
                .z = z.data(),
                .routes = &routes},
               0, 1);
    if (ith == 0) {
      step_.routes = routes;
      std::ranges::copy(z, floats(dst) + (dst->ne[0] - n_z));
    }
    site_expert_up(call(nth), routes, z.data(), floats(dst));
  }
};

/// [hidden, z] -> the chosen experts' parts [d_inner, n_expert_used * n_uses]
class DownNode final : public SiteNode {
 public:
  using SiteNode::SiteNode;
  void run(ggml_tensor* dst, int, int nth) override {
    site_expert_down(call(nth), step_.routes, floats(dst->src[0]), floats(dst));
  }
};

/// h, [hidden, z], parts -> h with the packs' shares, in place.
class OutAddNode final : public SiteNode {
 public:
  using SiteNode::SiteNode;
  void run(ggml_tensor* dst, int, int nth) override {
    thread_local std::vector<float> y, amounts;
    const std::int64_t d_inner = site_.in->ne[1];
    const auto n_uses = std::ssize(step_.uses.rows);
    ggml_tensor* hidden_z = dst->src[1];
    y.resize(static_cast<std::size_t>(d_inner * n_uses));
    site_mix(site_, step_.routes, floats(hidden_z) + (hidden_z->ne[0] - d_inner * n_uses),
             floats(dst->src[2]), 0, n_uses, y.data());
    amounts.resize(static_cast<std::size_t>(n_uses));
    for (std::size_t use = 0; use < amounts.size(); ++use) {
      amounts[use] = step_.uses.amounts[use] * step_.routes.factors[use];
    }
    site_out_add(call(nth), y.data(), amounts.data(), floats(dst));
  }
};

}  // namespace

Tensor pack_add_few_node(GraphBuilder& g, const SiteWeights& site, PackPoolStep& step,
                         std::int64_t n_uses, Tensor x, Tensor h) {
  expect_shape(x, "a site's input", {site.in->ne[0], -1});
  const std::int64_t d_inner = site.in->ne[1], d_ff = site.expert_gate->ne[1];
  const std::int64_t n_choices = site.n_expert_used * n_uses;
  Tensor z = g.custom(std::make_unique<InNode>(site, step), d_inner, n_uses, {x});
  Tensor hidden_z = g.custom(std::make_unique<RouteUpNode>(site, step),
                             d_ff * n_choices + d_inner * n_uses, 1, {z, x});
  Tensor parts = g.custom(std::make_unique<DownNode>(site, step), d_inner, n_choices, {hidden_z});
  return g.custom_inplace(std::make_unique<OutAddNode>(site, step), h, {hidden_z, parts});
}

}  // namespace modularbase::kernels
