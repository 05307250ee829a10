#include "modularbase/kernels/pack_nodes.h"

#include <atomic>
#include <numeric>

#include "modularbase/kernels/grouped_linear.h"
#include "modularbase/kernels/simd.h"

namespace modularbase::kernels {
namespace {

float* floats(ggml_tensor* tensor) {
  return static_cast<float*>(tensor->data);
}

/// 0, 1, 2, ...: for lists whose entries are in order already.
const std::int32_t* counting(std::size_t n) {
  thread_local std::vector<std::int32_t> numbers;
  if (numbers.size() < n) {
    numbers.resize(n);
    std::iota(numbers.begin(), numbers.end(), 0);
  }
  return numbers.data();
}

/// Groups of the uses of each slot, for a matrix that every slot has one of.
const std::vector<RowGroup>& group_by_slot(const PackUses& uses, const ggml_tensor* weight) {
  thread_local std::vector<RowGroup> groups;
  groups.clear();
  for (const SlotRun& run : uses.runs) {
    groups.push_back({static_cast<const std::byte*>(weight->data) +
                          static_cast<std::size_t>(run.slot) * weight->nb[2],
                      nullptr, run.first, run.n});
  }
  return groups;
}

class SiteNode : public CustomNode {
 public:
  SiteNode(const SiteWeights& site, PackPoolStep& step) : site_(site), step_(step) {}
  void reset() override { next_chunk_.store(0, std::memory_order_relaxed); }

 protected:
  const SiteWeights& site_;
  PackPoolStep& step_;
  std::atomic<int> next_chunk_{0};
};

/// x [n_embd, n_rows] -> W_in x [d_inner, n_uses]
class InNode final : public SiteNode {
 public:
  using SiteNode::SiteNode;
  void run(ggml_tensor* dst, int, int nth) override {
    grouped_linear({.type = site_.in->type,
                    .n_in = site_.in->ne[0],
                    .n_out = site_.in->ne[1],
                    .groups = group_by_slot(step_.uses, site_.in),
                    .x_rows = step_.uses.rows.data(),
                    .y_rows = counting(step_.uses.rows.size()),
                    .x = floats(dst->src[0]),
                    .y = floats(dst),
                    .next_chunk = &next_chunk_},
                   nth);
  }
};

/// W_in x -> z, in place; routes.
class RouteNode final : public SiteNode {
 public:
  RouteNode(const SiteWeights& site, PackPoolStep& step, Tensor x) : SiteNode(site, step), x_(x) {}
  void run(ggml_tensor* dst, int ith, int nth) override {
    pack_route({.weights = &site_,
                .uses = &step_.uses,
                .x = floats(x_),
                .z = floats(dst),
                .routes = &step_.routes},
               ith, nth);
  }

 private:
  Tensor x_;  // kept alive by the node that adds the deltas
};

/// z [d_inner, n_uses] -> silu(W_gate z) * (W_up z) of the chosen experts
/// [d_ff, n_expert_used * n_uses]
class ExpertUpNode final : public SiteNode {
 public:
  using SiteNode::SiteNode;
  void run(ggml_tensor* dst, int, int nth) override {
    const ExpertGroups& experts =
        group_by_expert(step_.routes, step_.uses, site_, site_.expert_gate, site_.expert_up);
    grouped_linear({.type = site_.expert_gate->type,
                    .n_in = site_.expert_gate->ne[0],
                    .n_out = site_.expert_gate->ne[1],
                    .groups = experts.groups,
                    .x_rows = experts.uses.data(),
                    .y_rows = experts.choices.data(),
                    .x = floats(dst->src[0]),
                    .y = floats(dst),
                    .next_chunk = &next_chunk_},
                   nth);
  }
};

/// [d_ff, n_expert_used * n_uses] -> W_down of the chosen experts [d_inner, n_expert_used * n_uses]
class ExpertDownNode final : public SiteNode {
 public:
  using SiteNode::SiteNode;
  void run(ggml_tensor* dst, int, int nth) override {
    const ExpertGroups& experts =
        group_by_expert(step_.routes, step_.uses, site_, site_.expert_down, nullptr);
    grouped_linear({.type = site_.expert_down->type,
                    .n_in = site_.expert_down->ne[0],
                    .n_out = site_.expert_down->ne[1],
                    .groups = experts.groups,
                    .x_rows = experts.choices.data(),
                    .y_rows = experts.choices.data(),
                    .x = floats(dst->src[0]),
                    .y = floats(dst),
                    .next_chunk = &next_chunk_},
                   nth);
  }
};

/// y = z + sum of the chosen experts' outputs, each times its gain. [d_inner, n_uses]
class MixNode final : public SiteNode {
 public:
  using SiteNode::SiteNode;
  void run(ggml_tensor* dst, int ith, int nth) override {
    const std::int64_t d_inner = dst->ne[0], n_uses = dst->ne[1], n_used = site_.n_expert_used;
    for (std::int64_t use = n_uses * ith / nth; use < n_uses * (ith + 1) / nth; ++use) {
      const float* z = floats(dst->src[0]) + use * d_inner;
      const float* parts = floats(dst->src[1]) + use * n_used * d_inner;
      const float* gains = step_.routes.gains.data() + use * n_used;
      float* y = floats(dst) + use * d_inner;
      for (std::int64_t i = 0; i < d_inner; i += simd::kLanes) {  // a multiple of 256
        simd::Vec sum = simd::load(z + i);
        for (std::int64_t k = 0; k < n_used; ++k) {
          sum = simd::fma(simd::set1(gains[k]), simd::load(parts + k * d_inner + i), sum);
        }
        simd::store(y + i, sum);
      }
    }
  }
};

/// y [d_inner, n_uses] -> W_out y [n_embd, n_uses]
class OutNode final : public SiteNode {
 public:
  using SiteNode::SiteNode;
  void run(ggml_tensor* dst, int, int nth) override {
    const std::int32_t* in_order = counting(step_.uses.rows.size());
    grouped_linear({.type = site_.out->type,
                    .n_in = site_.out->ne[0],
                    .n_out = site_.out->ne[1],
                    .groups = group_by_slot(step_.uses, site_.out),
                    .x_rows = in_order,
                    .y_rows = in_order,
                    .x = floats(dst->src[0]),
                    .y = floats(dst),
                    .next_chunk = &next_chunk_},
                   nth);
  }
};

class MergeNode final : public CustomNode {
 public:
  MergeNode(const std::vector<PoolDelta>& pools, const PackShares& shares, int layer)
      : pools_(pools), shares_(shares), layer_(layer) {}

  void run(ggml_tensor* dst, int ith, int nth) override {
    std::vector<PackDeltas> deltas;
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
                                    std::initializer_list<Tensor> sources) {
    return g.custom(std::make_unique<Node>(site, step), ne0, ne1, sources);
  };
  Tensor z = node.template operator()<InNode>(d_inner, n_uses, {x});
  z = g.custom_inplace(std::make_unique<RouteNode>(site, step, x), z);
  Tensor hidden = node.template operator()<ExpertUpNode>(d_ff, n_choices, {z});
  Tensor parts = node.template operator()<ExpertDownNode>(d_inner, n_choices, {hidden});
  Tensor y = node.template operator()<MixNode>(d_inner, n_uses, {z, parts});
  // x is a source here so that its memory is not reused before the route node has read it.
  return node.template operator()<OutNode>(site.out->ne[1], n_uses, {y, x});
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
