#pragma once

#include <cstdint>
#include <span>

namespace modularbase::kernels {

/// Uses [first, first + n) of one slot.
struct SlotRun {
  std::int32_t slot;
  std::int32_t first;
  std::int32_t n;
};

/// Which rows of a step use which slots of a pool: use u is row rows[u] with its run's slot. The
/// same for every site; filled before each step.
struct PackUses {
  std::span<const std::int32_t> rows;  // of x
  std::span<const SlotRun> runs;       // in order of slots
  std::span<const float> amounts;      // of each use: the request's weight x the pack's s_p
};

/// How the packs of one row are joined.
enum class MergePolicy : std::uint8_t {
  kBlend,     // the weighted sum
  kBest,      // only the one with the largest weight x token gate
  kPriority,  // only the first whose token gate is open, else the one with the largest gate
  kTies,      // by element, the weighted sum of those that agree with its sign: the election of
              // arXiv:2306.01708, without its mean
};

/// One pack's share in a row.
struct PackShare {
  std::int32_t pool;  // index of the deltas it is in
  std::int32_t use;
  float weight;  // the request's weight
  float scale;   // the pack's s_p
};

/// The shares of every row, in the order of the request's packs.
struct PackShares {
  std::span<const std::int32_t> first;  // [n_rows + 1]
  std::span<const PackShare> shares;
  std::span<const MergePolicy> policies;  // [n_rows]
  /// [conflict_stride] a layer: mean cosine between the deltas of the row's packs, NaN with fewer
  /// than two, at conflict_rows[row]; null: not wanted.
  float* conflict = nullptr;
  std::int64_t conflict_stride = 0;
  std::span<const std::int32_t> conflict_rows = {};  // empty: the row itself
  std::int64_t n_rows() const { return static_cast<std::int64_t>(policies.size()); }
};

}  // namespace modularbase::kernels
