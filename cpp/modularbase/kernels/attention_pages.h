#pragma once

#include <algorithm>

#include "modularbase/kernels/attention_types.h"

namespace modularbase::kernels {

/// The blocks of a part that show something to a row.
struct Pages {
  Page pages[kMaxPages];
  int n = 0;

  void add(const Page& page) { pages[n++] = page; }
  bool has(TileFormat KvTierLayer::* kind, TileFormat format) const {
    return std::any_of(pages, pages + n,
                       [&](const Page& page) { return page.tier->*kind == format; });
  }
};

/// What a row of a short span sees of an item's part.
Pages pages_of(const AttentionArgs& args, const AttentionSpan& span, const AttentionItem& item,
               int row);

}  // namespace modularbase::kernels
