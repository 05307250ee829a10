#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "modularbase/kernels/pack_nodes.h"
#include "modularbase/packs/slot_pool.h"

namespace modularbase {

inline constexpr int kMaxPacksPerRow = 4;
inline constexpr std::size_t kMaxPoolsPerStep = 8;

/// The packs of a request, as rows use them.
struct PackSet {
  struct Entry {
    const SlotPool* pool;
    int slot;
    float weight;
    float scale;
  };
  std::vector<Entry> entries;  // at most kMaxPacksPerRow, in the request's order
  kernels::MergePolicy policy = kernels::MergePolicy::kBlend;
};

/// The packs of one row of a step; null: none.
using RowPackSets = std::span<const PackSet* const>;

/// Some rows of a step and the packs they use. Addresses are fixed: graphs refer to them.
class PackRows {
 public:
  /// \param sets one a row.
  void fill(RowPackSets sets, std::span<const SlotPool* const> pools);

  std::int64_t n_uses(std::size_t pool) const {
    return static_cast<std::int64_t>(use_rows_[pool].size());
  }
  /// Most packs of one pool in a row.
  std::int64_t n_per_row(std::size_t pool) const { return n_per_row_[pool]; }
  kernels::PackPoolStep& step(std::size_t pool) { return steps_[pool]; }
  const kernels::PackShares& shares() const { return shares_; }
  /// Where cosines go: `stride` a layer, row i at rows[i] (empty: at i).
  void set_conflict(float* conflict, std::int64_t stride, std::span<const std::int32_t> rows) {
    shares_.conflict = conflict;
    shares_.conflict_stride = stride;
    shares_.conflict_rows = rows;
  }

  /// For graphs of ggml's ops: n_per_row slots and weights a row, slot 0 where a row has fewer.
  void fill_padded(std::size_t pool, std::vector<std::int32_t>& slots,
                   std::vector<float>& weights) const;

 private:
  void add_uses(RowPackSets sets, const SlotPool* pool, std::size_t index);
  void add_shares(RowPackSets sets, std::span<const SlotPool* const> pools);

  std::array<kernels::PackPoolStep, kMaxPoolsPerStep> steps_;
  std::array<std::vector<std::int32_t>, kMaxPoolsPerStep> use_rows_;
  std::array<std::vector<kernels::SlotRun>, kMaxPoolsPerStep> runs_;
  std::array<std::vector<float>, kMaxPoolsPerStep> amounts_;
  std::array<std::int64_t, kMaxPoolsPerStep> n_per_row_{};
  kernels::PackShares shares_;
  std::vector<std::int32_t> first_share_;
  std::vector<kernels::PackShare> share_list_;
  std::vector<kernels::MergePolicy> policies_;
  std::vector<const PackSet*> sets_;
  std::vector<const SlotPool*> pools_;
};

/// Which of a step's rows a layer computes.
enum class RowScope : std::uint8_t {
  kTokens,   // below the split: all but the rows that restart there
  kAll,      //
  kOutputs,  // at the end of the last layer, where it is cut to rows with an output
};
inline constexpr std::size_t kRowScopes = 3;

/// What a step's graph depends on: which pools its rows use, and how often in each scope.
struct PackPoolKey {
  const SlotPool* pool;
  std::array<std::int64_t, kRowScopes> n_uses;
  bool has_pairs;  // some row of the step has two packs
  bool operator==(const PackPoolKey&) const = default;
};

/// The packs of a step's rows. Refilled before each step.
class PackBatch {
 public:
  /// \param sets one a row, token rows first.
  /// \param n_tokens how many of them are token rows.
  /// \param out_rows the rows that the last layer's end is cut to.
  /// \throws InvalidRequestError when a step would need more than kMaxPoolsPerStep pools.
  void fill(RowPackSets sets, std::size_t n_tokens, std::span<const std::int32_t> out_rows);

  bool empty() const { return pools_.empty(); }
  /// For fused nodes; for graphs of ggml's ops the counts are padded to whole rows.
  std::vector<PackPoolKey> key() const;
  std::vector<PackPoolKey> padded_key() const;

  PackRows& rows(RowScope scope) { return rows_[static_cast<std::size_t>(scope)]; }

  /// Mean cosine between the deltas of a row's packs, layer by layer [n_rows, n_layer]; NaN where
  /// it has fewer than two. Empty when no row of the step has two.
  std::span<float> conflict(std::int64_t n_layer);

 private:
  std::vector<const SlotPool*> pools_;
  std::vector<const PackSet*> out_sets_;
  std::vector<std::int32_t> out_rows_;
  std::array<PackRows, kRowScopes> rows_;
  std::vector<float> conflict_;
  bool has_pairs_ = false;
};

}  // namespace modularbase
