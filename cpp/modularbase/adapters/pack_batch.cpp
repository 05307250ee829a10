#include "modularbase/adapters/pack_batch.h"

#include <algorithm>
#include <limits>

#include "modularbase/core/errors.h"

namespace modularbase {

void PackRows::fill(RowPackSets sets, std::span<const SlotPool* const> pools) {
  sets_.assign(sets.begin(), sets.end());
  pools_.assign(pools.begin(), pools.end());
  for (std::size_t i = 0; i < pools.size(); ++i) add_uses(sets, pools[i], i);
  add_shares(sets, pools);
}

// Uses in order of slots: rows of one slot are neighbours, whatever requests they belong to.
void PackRows::add_uses(RowPackSets sets, const SlotPool* pool, std::size_t index) {
  auto& rows = use_rows_[index];
  auto& runs = runs_[index];
  auto& amounts = amounts_[index];
  struct Use {
    int slot;
    std::int32_t row;
    float amount;
    auto operator<=>(const Use&) const = default;
  };
  std::vector<Use> uses;
  n_per_row_[index] = 0;
  for (std::size_t row = 0; row < sets.size(); ++row) {
    if (!sets[row]) continue;
    std::int64_t n = 0;
    for (const PackSet::Entry& entry : sets[row]->entries) {
      if (entry.pool != pool) continue;
      uses.push_back({entry.slot, static_cast<std::int32_t>(row), entry.weight * entry.scale});
      ++n;
    }
    n_per_row_[index] = std::max(n_per_row_[index], n);
  }
  std::ranges::sort(uses);
  rows.clear();
  runs.clear();
  amounts.clear();
  for (const auto& [slot, row, amount] : uses) {
    if (runs.empty() || runs.back().slot != slot) {
      runs.push_back({slot, static_cast<std::int32_t>(rows.size()), 0});
    }
    ++runs.back().n;
    rows.push_back(row);
    amounts.push_back(amount);
  }
  steps_[index].uses = {rows, runs, amounts};
  steps_[index].routes.resize(static_cast<std::int64_t>(rows.size()),
                              pool->geometry().n_expert_used);
}

void PackRows::add_shares(RowPackSets sets, std::span<const SlotPool* const> pools) {
  first_share_.assign(1, 0);
  share_list_.clear();
  policies_.clear();
  for (std::size_t row = 0; row < sets.size(); ++row) {
    policies_.push_back(sets[row] ? sets[row]->policy : kernels::MergePolicy::kBlend);
    if (sets[row]) {
      for (const PackSet::Entry& entry : sets[row]->entries) {
        const auto index =
            static_cast<std::size_t>(std::ranges::find(pools, entry.pool) - pools.begin());
        const auto run = std::ranges::find(runs_[index], entry.slot, &kernels::SlotRun::slot);
        const auto* rows = use_rows_[index].data();
        const auto* use = std::lower_bound(rows + run->first, rows + run->first + run->n,
                                           static_cast<std::int32_t>(row));
        share_list_.push_back({static_cast<std::int32_t>(index),
                               static_cast<std::int32_t>(use - rows), entry.weight, entry.scale});
      }
    }
    first_share_.push_back(static_cast<std::int32_t>(share_list_.size()));
  }
  shares_ = {first_share_, share_list_, policies_, nullptr};
}

void PackRows::fill_padded(std::size_t pool, std::vector<std::int32_t>& slots,
                           std::vector<float>& weights) const {
  const auto n = static_cast<std::size_t>(n_per_row_[pool]);
  slots.assign(n * sets_.size(), 0);
  weights.assign(slots.size(), 0.0f);
  for (std::size_t row = 0; row < sets_.size(); ++row) {
    if (!sets_[row]) continue;
    std::size_t at = row * n;
    for (const PackSet::Entry& entry : sets_[row]->entries) {
      if (entry.pool != pools_[pool]) continue;
      slots[at] = entry.slot;
      weights[at++] = entry.weight * entry.scale;
    }
  }
}

void PackBatch::fill(RowPackSets sets, std::size_t n_tokens,
                     std::span<const std::int32_t> out_rows) {
  pools_.clear();
  has_pairs_ = false;
  const PackSet* last = nullptr;
  for (const PackSet* set : sets) {
    if (!set || set == last) continue;
    last = set;
    has_pairs_ = has_pairs_ || set->entries.size() > 1;
    for (const PackSet::Entry& entry : set->entries) {
      if (std::ranges::find(pools_, entry.pool) == pools_.end()) pools_.push_back(entry.pool);
    }
  }
  if (pools_.empty()) return;
  if (pools_.size() > kMaxPoolsPerStep) {
    throw InvalidRequestError("packs", "at most 8 geometries in one step",
                              std::to_string(pools_.size()));
  }
  std::ranges::sort(pools_, std::less<>());  // equal steps get equal keys
  out_sets_.clear();
  out_rows_.assign(out_rows.begin(), out_rows.end());
  for (const std::int32_t row : out_rows) out_sets_.push_back(sets[static_cast<std::size_t>(row)]);
  rows(RowScope::kTokens).fill(sets.first(n_tokens), pools_);
  rows(RowScope::kAll).fill(sets, pools_);
  rows(RowScope::kOutputs).fill(out_sets_, pools_);
}

std::vector<PackPoolKey> PackBatch::key() const {
  std::vector<PackPoolKey> key;
  for (std::size_t i = 0; i < pools_.size(); ++i) {
    PackPoolKey& pool = key.emplace_back(PackPoolKey{pools_[i], {}, has_pairs_});
    for (std::size_t scope = 0; scope < kRowScopes; ++scope) {
      pool.n_uses[scope] = rows_[scope].n_uses(i);
    }
  }
  return key;
}

std::vector<PackPoolKey> PackBatch::padded_key() const {
  std::vector<PackPoolKey> key;
  for (std::size_t i = 0; i < pools_.size(); ++i) {
    PackPoolKey& pool = key.emplace_back(PackPoolKey{pools_[i], {}, has_pairs_});
    for (std::size_t scope = 0; scope < kRowScopes; ++scope) {
      pool.n_uses[scope] = rows_[scope].n_per_row(i) * rows_[scope].shares().n_rows();
    }
  }
  return key;
}

std::span<float> PackBatch::conflict(std::int64_t n_layer) {
  if (!has_pairs_) return {};
  PackRows& all = rows(RowScope::kAll);
  const std::int64_t n_rows = all.shares().n_rows();
  conflict_.assign(static_cast<std::size_t>(n_layer * n_rows),
                   std::numeric_limits<float>::quiet_NaN());
  all.set_conflict(conflict_.data(), n_rows, {});
  rows(RowScope::kTokens).set_conflict(conflict_.data(), n_rows, {});
  rows(RowScope::kOutputs).set_conflict(conflict_.data(), n_rows, out_rows_);
  return conflict_;
}

}  // namespace modularbase
