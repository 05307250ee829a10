#include "modularbase/kernels/attention.h"

#include "modularbase/kernels/attention_scratch.h"
#include "modularbase/kernels/simd.h"

namespace modularbase::kernels {

bool attention_supported(std::int64_t head_dim) {
  return head_dim % 16 == 0 && head_dim <= kMaxHeadDim;
}

void attention(const AttentionArgs& args, int, int nth) {
  const auto& items = args.scratch->items();
  const int n_items = static_cast<int>(items.size());
  bool is_first = true;
  for (int i = args.next_chunk->fetch_add(1); i < n_items; i = args.next_chunk->fetch_add(1)) {
    const AttentionItem& item = items[static_cast<std::size_t>(i)];
    if (item.n_parts == 0) {
      attend_tile(args, item);
      continue;
    }
    // Tiles come first in the plan, so that what follows a part is a part.
    const int next = i + nth;
    const AttentionItem* then = next < n_items ? &items[static_cast<std::size_t>(next)] : nullptr;
    attend_part(args, item, {is_first, then});
    is_first = false;
  }
}

}  // namespace modularbase::kernels
