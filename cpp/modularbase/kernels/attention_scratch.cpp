#include "modularbase/kernels/attention_scratch.h"

namespace modularbase::kernels {
void AttentionScratch::plan_tiles(const AttentionSpan& span, std::int32_t index,
                                  std::int64_t n_head_kv) {
  // The last rows see the most positions: started first, they do not hold up the end.
  const std::int32_t last = (span.n_rows - 1) / kTileRows * kTileRows;
  for (std::int32_t row = last; row >= 0; row -= kTileRows) {
    for (std::int32_t head = 0; head < n_head_kv; ++head) {
      items_.push_back({index, head, row, 0, 0, 0});
    }
  }
}

void AttentionScratch::plan(const AttentionBatch& batch, std::int64_t n_head,
                            std::int64_t n_head_kv, std::int64_t head_dim) {
  items_.clear();
  const std::int64_t stride = partial_stride(n_head / n_head_kv, head_dim);
  std::int64_t n_partials = 0;
  std::int32_t n_merges = 0;
  for (std::int32_t i = 0; i < batch.n_spans; ++i) {
    if (batch.spans[i].n_rows >= kTileSpanRows) plan_tiles(batch.spans[i], i, n_head_kv);
  }
  for (std::int32_t i = 0; i < batch.n_spans; ++i) {
    const AttentionSpan& span = batch.spans[i];
    if (span.n_rows >= kTileSpanRows) continue;
    const std::int32_t n_parts = parts_of(span, span.n_rows - 1);
    for (std::int32_t head = 0; head < n_head_kv; ++head) {
      for (std::int32_t part = 0; part < n_parts; ++part) {
        items_.push_back({i, head, part, n_parts, n_partials, n_merges});
      }
      n_partials += n_parts > 1 ? n_parts * span.n_rows * stride : 0;
      n_merges += n_parts > 1 ? 1 : 0;
    }
  }
  if (n_partials > n_partials_) {
    partials_ = std::make_unique_for_overwrite<float[]>(static_cast<std::size_t>(n_partials));
    n_partials_ = n_partials;
  }
  if (n_merges > n_merges_) {
    n_done_ = std::make_unique<std::atomic<int>[]>(static_cast<std::size_t>(n_merges));
    n_merges_ = n_merges;
  }
}

}  // namespace modularbase::kernels
