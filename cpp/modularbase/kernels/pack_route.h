#pragma once

#include <cstdint>
#include <vector>

#include "modularbase/graph/site_weights.h"
#include "modularbase/kernels/grouped_linear.h"
#include "modularbase/kernels/pack_rows.h"

namespace modularbase::kernels {

/// Which experts each use takes at one site, and how much of each. The routing of the step's
/// current site: sites run one after the other.
struct PackRoutes {
  std::vector<std::int32_t> experts;  // [n_expert_used, n_uses]: numbers within the pack
  std::vector<float> gains;           // [n_expert_used, n_uses], adding up to 1
  std::vector<float> factors;         // [n_uses]: token gate, 2 sigmoid(v . x + b)

  void resize(std::int64_t n_uses, std::int64_t n_expert_used);
};

struct PackRouteArgs {
  const SiteWeights* weights;
  const PackUses* uses;
  const float* x;  // [n_embd, n_rows]
  float* z;        // [d_inner, n_uses]: W_in x, normalised in place
  PackRoutes* routes;
};

/// z = RMSNorm(z) * g, the n_expert_used likeliest experts of softmax(W_gate z), the token gate.
void pack_route(const PackRouteArgs& args, int ith, int nth);

/// Uses by expert, for grouped_linear: entry lists and groups, valid until the thread's next call.
struct ExpertGroups {
  std::vector<RowGroup> groups;
  std::vector<std::int32_t> uses;     // of each entry
  std::vector<std::int32_t> choices;  // of each entry: n_expert_used * use + rank
};
/// Every thread derives the same groups. up is null for a plain product.
const ExpertGroups& group_by_expert(const PackRoutes& routes, const PackUses& uses,
                                    const SiteWeights& site, const ggml_tensor* weight,
                                    const ggml_tensor* up_weight);

}  // namespace modularbase::kernels
