#include "modularbase/kernels/pack_steps.h"

#include <numeric>

#include "modularbase/kernels/grouped_linear.h"
#include "modularbase/kernels/simd.h"

namespace modularbase::kernels {
namespace {

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

/// Which rows of the operands the entries of the groups are.
struct Entries {
  std::span<const RowGroup> groups;
  const std::int32_t* x_rows;
  const std::int32_t* y_rows;
  const float* amounts = nullptr;
};

void multiply(const SiteCall& call, const ggml_tensor* weight, const Entries& entries,
              const float* x, float* y) {
  grouped_linear({.type = weight->type,
                  .n_in = weight->ne[0],
                  .n_out = weight->ne[1],
                  .groups = entries.groups,
                  .x_rows = entries.x_rows,
                  .y_rows = entries.y_rows,
                  .x = x,
                  .y = y,
                  .amounts = entries.amounts,
                  .next_chunk = call.next_chunk},
                 call.nth);
}

}  // namespace

void site_in(const SiteCall& call, const float* x, float* z) {
  multiply(call, call.site.in,
           {.groups = group_by_slot(call.uses, call.site.in),
            .x_rows = call.uses.rows.data(),
            .y_rows = counting(call.uses.rows.size())},
           x, z);
}

void site_expert_up(const SiteCall& call, const PackRoutes& routes, const float* z, float* hidden) {
  const ExpertGroups& experts =
      group_by_expert(routes, call.uses, call.site, call.site.expert_gate, call.site.expert_up);
  multiply(
      call, call.site.expert_gate,
      {.groups = experts.groups, .x_rows = experts.uses.data(), .y_rows = experts.choices.data()},
      z, hidden);
}

void site_expert_down(const SiteCall& call, const PackRoutes& routes, const float* hidden,
                      float* parts) {
  const ExpertGroups& experts =
      group_by_expert(routes, call.uses, call.site, call.site.expert_down, nullptr);
  multiply(call, call.site.expert_down,
           {.groups = experts.groups,
            .x_rows = experts.choices.data(),
            .y_rows = experts.choices.data()},
           hidden, parts);
}

void site_mix(const SiteWeights& site, const PackRoutes& routes, const float* z, const float* parts,
              std::int64_t begin, std::int64_t end, float* y) {
  const std::int64_t d_inner = site.in->ne[1], n_used = site.n_expert_used;
  for (std::int64_t use = begin; use < end; ++use) {
    const float* gains = routes.gains.data() + use * n_used;
    const float* first = parts + use * n_used * d_inner;
    for (std::int64_t i = 0; i < d_inner; i += simd::kLanes) {  // a multiple of 256
      simd::Vec sum = simd::load(z + use * d_inner + i);
      for (std::int64_t k = 0; k < n_used; ++k) {
        sum = simd::fma(simd::set1(gains[k]), simd::load(first + k * d_inner + i), sum);
      }
      simd::store(y + use * d_inner + i, sum);
    }
  }
}

void site_out(const SiteCall& call, const float* y, float* delta) {
  const std::int32_t* in_order = counting(call.uses.rows.size());
  multiply(
      call, call.site.out,
      {.groups = group_by_slot(call.uses, call.site.out), .x_rows = in_order, .y_rows = in_order},
      y, delta);
}

void site_out_add(const SiteCall& call, const float* y, const float* amounts, float* h) {
  multiply(call, call.site.out,
           {.groups = group_by_slot(call.uses, call.site.out),
            .x_rows = counting(call.uses.rows.size()),
            .y_rows = call.uses.rows.data(),
            .amounts = amounts},
           y, h);
}

}  // namespace modularbase::kernels
