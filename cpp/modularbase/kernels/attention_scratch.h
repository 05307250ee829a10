#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "modularbase/kernels/attention.h"

namespace modularbase::kernels {

// Spans of fewer rows are computed row by row; longer ones fill tiles.
inline constexpr int kTileSpanRows = 8;
// Rows of one tile; times the group size they share each converted key and value.
inline constexpr int kTileRows = 64;
// What a short span sees is split into parts, so that threads can share it: first its segments, so
// many a part, counted from the first one, then the positions of its table, counted from 0. A part
// costs as much as a block in 4 bits beside its blocks; those are smaller, so that it may have
// more.
inline constexpr int kPartSegments = 8;
inline constexpr int kPartBlocks = 4;
inline constexpr int kPartTokens = kPartBlocks * kBlockTokens;

inline int segment_parts(const AttentionSpan& span) {
  return (span.n_segments + kPartSegments - 1) / kPartSegments;
}
/// Parts that a row of the span sees.
inline int parts_of(const AttentionSpan& span, int row) {
  return segment_parts(span) + (span.pos0 + row) / kPartTokens - span.first / kPartTokens + 1;
}

/// One piece of a layer's attention: a tile of rows, or a part of what a short span sees,
/// for one kv head.
struct AttentionItem {
  std::int32_t span;
  std::int32_t kv_head;
  std::int32_t first;    // first row of the tile, or index of the part
  std::int32_t n_parts;  // 0: a tile
  std::int64_t
      partials;  // short spans of several parts: where their results go in the scratch, in floats
  std::int32_t merge;  // and the counter of finished parts
};

/// The pieces of a step, the same for every layer, and room for partial results. Planned before the
/// step runs, read by all threads during it; grows to the largest step seen.
class AttentionScratch {
 public:
  void plan(const AttentionBatch& batch, std::int64_t n_head, std::int64_t n_head_kv,
            std::int64_t head_dim);

  const std::vector<AttentionItem>& items() const { return items_; }
  float* partials(const AttentionItem& item) { return partials_.get() + item.partials; }
  std::atomic<int>& n_done(const AttentionItem& item) {
    return n_done_[static_cast<std::size_t>(item.merge)];
  }

 private:
  void plan_tiles(const AttentionSpan& span, std::int32_t index, std::int64_t n_head_kv);

  std::vector<AttentionItem> items_;
  std::unique_ptr<float[]> partials_;
  std::int64_t n_partials_ = 0;
  std::unique_ptr<std::atomic<int>[]> n_done_;  // all zero between layers
  std::int32_t n_merges_ = 0;
};

/// Floats of one row's partial result of one part: per query head of the group its maximum, its
/// sum, and head_dim weighted values.
inline std::int64_t partial_stride(std::int64_t group, std::int64_t head_dim) {
  return group * (head_dim + 2);
}

void attend_tile(const AttentionArgs& args, const AttentionItem& item);
/// What else a thread does around a part, for the memory's sake.
struct PartOrder {
  bool is_first;              // of this thread in this layer
  const AttentionItem* next;  // that the thread will likely take then, or null
};
void attend_part(const AttentionArgs& args, const AttentionItem& item, const PartOrder& order);

}  // namespace modularbase::kernels
