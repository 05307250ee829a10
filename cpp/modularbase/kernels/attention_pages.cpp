// What a part of what a short span sees consists of.
#include "modularbase/kernels/attention_pages.h"

namespace modularbase::kernels {

Pages pages_of(const AttentionArgs& args, const AttentionSpan& span, const AttentionItem& item,
               int row) {
  Pages result;
  const int n_segment_parts = segment_parts(span);
  if (item.first < n_segment_parts) {
    const int begin = item.first * kPartSegments;
    const int end = std::min(begin + kPartSegments, span.n_segments);
    for (int i = begin; i < end; ++i) {
      const KvSegment& segment = span.segments[i];
      if (segment.visible == 0 || !args.kv.tiers[segment.tier].has(item.kv_head)) continue;
      result.add(page_of(args.kv, segment.tier, segment.block, item.kv_head, segment.visible));
    }
    return result;
  }
  const int begin = (span.first / kPartTokens + item.first - n_segment_parts) * kPartTokens;
  const int end = std::min(begin + kPartTokens, span.pos0 + row + 1);
  for (int at = begin; at < end; at += kBlockTokens) {
    const int first = std::max(span.first - at, 0);
    if (first >= kBlockTokens) continue;
    const std::uint64_t visible = token_bits(first, std::min(kBlockTokens, end - at));
    const std::int32_t block = span.block_table[at / kBlockTokens];
    result.add(page_of(args.kv, kExactTier, block, item.kv_head, visible));
  }
  return result;
}

}  // namespace modularbase::kernels
