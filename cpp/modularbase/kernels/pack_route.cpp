#include "modularbase/kernels/pack_route.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "modularbase/kernels/simd.h"

namespace modularbase::kernels {
namespace {

constexpr std::int64_t kMaxExperts = 64;

const float* slot_floats(const ggml_tensor* tensor, int slot, int stride_dim) {
  return reinterpret_cast<const float*>(static_cast<const std::byte*>(tensor->data) +
                                        static_cast<std::size_t>(slot) * tensor->nb[stride_dim]);
}

float dot(const float* a, const float* b, std::int64_t n) {
  simd::Vec sums[4] = {simd::zero(), simd::zero(), simd::zero(), simd::zero()};
  std::int64_t i = 0;
  for (; i + 4 * simd::kLanes <= n; i += 4 * simd::kLanes) {
    for (int j = 0; j < 4; ++j) {
      const std::int64_t at = i + j * simd::kLanes;
      sums[j] = simd::fma(simd::load(a + at), simd::load(b + at), sums[j]);
    }
  }
  for (; i < n; i += simd::kLanes) {
    const int n_left = static_cast<int>(std::min<std::int64_t>(simd::kLanes, n - i));
    sums[0] = simd::fma(simd::load_first(a + i, n_left), simd::load_first(b + i, n_left), sums[0]);
  }
  float out[4];
  const simd::Vec sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  simd::sum_lanes4(sum, sum, sum, sum, out);
  return out[0];
}

void normalise(float* z, const float* gain, std::int64_t n, float eps) {
  const float mean = dot(z, z, n) / static_cast<float>(n);
  const simd::Vec scale = simd::set1(1.0f / std::sqrt(mean + eps));
  for (std::int64_t i = 0; i < n; i += simd::kLanes) {  // d_inner is a multiple of 256
    simd::store(z + i, simd::load(z + i) * scale * simd::load(gain + i));
  }
}

// The likeliest first; of equals the one with the lower number.
void choose_experts(const SiteWeights& w, const float* router, const float* z,
                    std::int32_t* experts, float* gains) {
  const std::int64_t d_inner = w.router->ne[0], n_expert = w.router->ne[1];
  std::array<float, kMaxExperts> logits;
  for (std::int64_t e = 0; e < n_expert; ++e) {
    logits[static_cast<std::size_t>(e)] = dot(router + e * d_inner, z, d_inner);
  }
  std::array<std::int32_t, kMaxExperts> order;
  for (std::int32_t e = 0; e < n_expert; ++e) order[static_cast<std::size_t>(e)] = e;
  std::partial_sort(order.begin(), order.begin() + w.n_expert_used, order.begin() + n_expert,
                    [&](std::int32_t a, std::int32_t b) {
                      const float la = logits[static_cast<std::size_t>(a)];
                      const float lb = logits[static_cast<std::size_t>(b)];
                      return la != lb ? la > lb : a < b;
                    });
  // The softmax's sum over all experts cancels in r_e / sum of the chosen r.
  float sum = 0.0f;
  const float largest = logits[static_cast<std::size_t>(order[0])];
  for (std::int64_t i = 0; i < w.n_expert_used; ++i) {
    const auto at = static_cast<std::size_t>(i);
    experts[i] = order[at];
    gains[i] = std::exp(logits[static_cast<std::size_t>(order[at])] - largest);
    sum += gains[i];
  }
  for (std::int64_t i = 0; i < w.n_expert_used; ++i) gains[i] /= sum;
}

}  // namespace

void PackRoutes::resize(std::int64_t n_uses, std::int64_t n_expert_used) {
  experts.resize(static_cast<std::size_t>(n_uses * n_expert_used));
  gains.resize(experts.size());
  factors.resize(static_cast<std::size_t>(n_uses));
}

void pack_route(const PackRouteArgs& args, int ith, int nth) {
  const SiteWeights& w = *args.weights;
  const std::int64_t n_embd = w.in->ne[0], d_inner = w.in->ne[1];
  const auto n_uses = static_cast<std::int64_t>(args.uses->rows.size());
  const std::int64_t begin = n_uses * ith / nth, end = n_uses * (ith + 1) / nth;
  for (const SlotRun& run : args.uses->runs) {
    const float* norm = slot_floats(w.norm, run.slot, 1);
    const float* router = slot_floats(w.router, run.slot, 2);
    const float* gate = slot_floats(w.token_gate, run.slot, 1);
    const float bias = *slot_floats(w.token_bias, run.slot, 1);
    const std::int64_t last = std::min<std::int64_t>(end, run.first + run.n);
    for (std::int64_t use = std::max<std::int64_t>(begin, run.first); use < last; ++use) {
      float* z = args.z + use * d_inner;
      normalise(z, norm, d_inner, w.norm_eps);
      choose_experts(w, router, z, args.routes->experts.data() + use * w.n_expert_used,
                     args.routes->gains.data() + use * w.n_expert_used);
      const float* x = args.x + args.uses->rows[static_cast<std::size_t>(use)] * n_embd;
      args.routes->factors[static_cast<std::size_t>(use)] =
          2.0f / (1.0f + std::exp(-(dot(gate, x, n_embd) + bias)));
    }
  }
}

const ExpertGroups& group_by_expert(const PackRoutes& routes, const PackUses& uses,
                                    const SiteWeights& site, const ggml_tensor* weight,
                                    const ggml_tensor* up_weight) {
  thread_local ExpertGroups out;
  const std::int64_t n_used = site.n_expert_used, n_expert = site.router->ne[1];
  const auto n_entries = routes.experts.size();
  out.groups.clear();
  out.uses.resize(n_entries);
  out.choices.resize(n_entries);
  const auto* slot_ids = static_cast<const std::int32_t*>(site.expert_ids->data);
  const auto matrix = [&](const ggml_tensor* tensor, std::int64_t number) -> const void* {
    if (!tensor) return nullptr;
    return static_cast<const std::byte*>(tensor->data) +
           static_cast<std::size_t>(number) * tensor->nb[2];
  };
  std::array<std::int32_t, kMaxExperts> at;
  for (const SlotRun& run : uses.runs) {
    at.fill(0);
    const std::int64_t first = run.first * n_used, last = (run.first + run.n) * n_used;
    for (std::int64_t i = first; i < last; ++i) {
      ++at[static_cast<std::size_t>(routes.experts[static_cast<std::size_t>(i)])];
    }
    auto next = static_cast<std::int32_t>(first);
    for (std::int64_t e = 0; e < n_expert; ++e) {
      const std::int32_t n = std::exchange(at[static_cast<std::size_t>(e)], next);
      if (n == 0) continue;
      const std::int64_t number = slot_ids[run.slot * n_expert + e];
      out.groups.push_back({matrix(weight, number), matrix(up_weight, number), next, n});
      next += n;
    }
    for (std::int64_t i = first; i < last; ++i) {
      const auto expert = static_cast<std::size_t>(routes.experts[static_cast<std::size_t>(i)]);
      const auto entry = static_cast<std::size_t>(at[expert]++);
      out.uses[entry] = static_cast<std::int32_t>(i / n_used);
      out.choices[entry] = static_cast<std::int32_t>(i);
    }
  }
  return out;
}

}  // namespace modularbase::kernels
