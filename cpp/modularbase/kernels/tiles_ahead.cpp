#include "modularbase/kernels/tiles_ahead.h"

#include "modularbase/kernels/attention_pages.h"

namespace modularbase::kernels {
namespace {

// The tiles of an item in the order in which they are read, for the last row, which sees all.
std::size_t add_tiles(const AttentionArgs& args, const AttentionItem& item, std::size_t n_skipped,
                      TilesAhead* ahead) {
  const AttentionSpan& span = args.batch->spans[item.span];
  const Pages pages = pages_of(args, span, item, span.n_rows - 1);
  std::size_t n_bytes = 0;
  const auto add = [&](const std::byte* tile, TileFormat format) {
    const std::size_t n = tile_bytes(format, args.kv.head_dim);
    n_bytes += n;
    if (n_skipped > 0) {
      --n_skipped;
    } else if (ahead) {
      ahead->add(tile, n);
    }
  };
  for (int i = 0; i < pages.n; ++i) add(pages.pages[i].k, pages.pages[i].tier->k_format);
  for (int i = 0; i < pages.n; ++i) add(pages.pages[i].v, pages.pages[i].tier->v_format);
  return n_bytes;
}

}  // namespace

TilesAhead tiles_ahead(const AttentionArgs& args, const AttentionItem& item,
                       const PartOrder& order) {
  TilesAhead ahead;
  const std::size_t n_bytes = add_tiles(args, item, 1, order.is_first ? &ahead : nullptr);
  if (order.next) add_tiles(args, *order.next, 0, &ahead);
  const auto n_rows = static_cast<std::size_t>(args.batch->spans[item.span].n_rows);
  if (n_bytes > 0) ahead.spread(n_bytes * n_rows);
  return ahead;
}

}  // namespace modularbase::kernels
