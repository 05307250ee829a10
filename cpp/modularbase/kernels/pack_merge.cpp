#include "modularbase/kernels/pack_merge.h"

#include <array>
#include <cmath>
#include <cstring>
#include <limits>

namespace modularbase::kernels {
namespace {

constexpr std::size_t kMaxPacks = 4;

/// A row's packs: what to add of each.
struct RowPacks {
  std::array<const float*, kMaxPacks> deltas;  // [n_embd]
  std::array<float, kMaxPacks> amounts;        // weight * scale * token gate
  std::array<float, kMaxPacks> factors;        // token gate
  std::array<float, kMaxPacks> gated;          // weight * token gate
  std::array<float, kMaxPacks> weights;        // of the request
  std::size_t n = 0;
};

RowPacks packs_of(const PackMergeArgs& args, std::int64_t row) {
  RowPacks packs;
  const auto at = static_cast<std::size_t>(row);
  for (auto i = args.shares->first[at]; i < args.shares->first[at + 1]; ++i) {
    const PackShare& share = args.shares->shares[static_cast<std::size_t>(i)];
    const PackDeltas& pool = args.pools[static_cast<std::size_t>(share.pool)];
    if (!pool.deltas) continue;  // no site of that pool at this layer
    const float factor = pool.factors[share.use];
    packs.deltas[packs.n] = pool.deltas + share.use * args.n_embd;
    packs.factors[packs.n] = factor;
    packs.gated[packs.n] = share.weight * factor;
    packs.weights[packs.n] = share.weight;
    packs.amounts[packs.n] = share.weight * share.scale * factor;
    ++packs.n;
  }
  return packs;
}

float cosine(const float* a, const float* b, std::int64_t n) {
  float ab = 0.0f, aa = 0.0f, bb = 0.0f;
  for (std::int64_t i = 0; i < n; ++i) {
    ab += a[i] * b[i];
    aa += a[i] * a[i];
    bb += b[i] * b[i];
  }
  return aa > 0.0f && bb > 0.0f ? ab / std::sqrt(aa * bb) : 0.0f;
}

float conflict_of(const RowPacks& packs, std::int64_t n_embd) {
  if (packs.n < 2) return std::numeric_limits<float>::quiet_NaN();
  float sum = 0.0f;
  int n_pairs = 0;
  for (std::size_t i = 0; i < packs.n; ++i) {
    for (std::size_t j = i + 1; j < packs.n; ++j, ++n_pairs) {
      const float sign = packs.amounts[i] * packs.amounts[j] < 0.0f ? -1.0f : 1.0f;
      sum += sign * cosine(packs.deltas[i], packs.deltas[j], n_embd);
    }
  }
  return sum / static_cast<float>(n_pairs);
}

void keep_only(RowPacks& packs, std::size_t chosen) {
  for (std::size_t i = 0; i < packs.n; ++i) {
    if (i != chosen) packs.amounts[i] = 0.0f;
  }
}

std::size_t largest(const std::array<float, kMaxPacks>& values, std::size_t n) {
  std::size_t best = 0;
  for (std::size_t i = 1; i < n; ++i) {
    if (values[i] > values[best]) best = i;
  }
  return best;
}

void choose_by_priority(RowPacks& packs) {
  std::array<float, kMaxPacks> gates{};  // zero of a pack that the request gives no weight
  for (std::size_t i = 0; i < packs.n; ++i) {
    if (packs.weights[i] > 0.0f) gates[i] = packs.factors[i];
    if (gates[i] >= 1.0f) return keep_only(packs, i);
  }
  keep_only(packs, largest(gates, packs.n));
}

void blend(const RowPacks& packs, std::int64_t n_embd, float* out) {
  for (std::size_t i = 0; i < packs.n; ++i) {
    if (packs.amounts[i] == 0.0f) continue;
    for (std::int64_t j = 0; j < n_embd; ++j) out[j] += packs.amounts[i] * packs.deltas[i][j];
  }
}

void elect_signs(const RowPacks& packs, std::int64_t n_embd, float* out) {
  for (std::int64_t j = 0; j < n_embd; ++j) {
    float above = 0.0f, below = 0.0f;  // what is added, and what is taken away
    for (std::size_t i = 0; i < packs.n; ++i) {
      const float part = packs.amounts[i] * packs.deltas[i][j];
      (part > 0.0f ? above : below) += part;
    }
    const float sum = above + below;
    if (sum != 0.0f) out[j] += sum > 0.0f ? above : below;
  }
}

void merge_row(RowPacks& packs, MergePolicy policy, std::int64_t n_embd, float* out) {
  if (packs.n > 1) {
    if (policy == MergePolicy::kTies) return elect_signs(packs, n_embd, out);
    if (policy == MergePolicy::kBest) keep_only(packs, largest(packs.gated, packs.n));
    if (policy == MergePolicy::kPriority) choose_by_priority(packs);
  }
  blend(packs, n_embd, out);
}

}  // namespace

void pack_merge(const PackMergeArgs& args, int ith, int nth) {
  const std::int64_t n_rows = args.shares->n_rows();
  for (std::int64_t row = n_rows * ith / nth; row < n_rows * (ith + 1) / nth; ++row) {
    float* out = args.out + row * args.n_embd;
    std::memcpy(out, args.h + row * args.n_embd,
                static_cast<std::size_t>(args.n_embd) * sizeof(float));
    RowPacks packs = packs_of(args, row);
    if (args.shares->conflict) {
      const auto rows = args.shares->conflict_rows;
      const std::int64_t at = rows.empty() ? row : rows[static_cast<std::size_t>(row)];
      args.shares->conflict[args.layer * args.shares->conflict_stride + at] =
          conflict_of(packs, args.n_embd);
    }
    merge_row(packs, args.shares->policies[static_cast<std::size_t>(row)], args.n_embd, out);
  }
}

}  // namespace modularbase::kernels
