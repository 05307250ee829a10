#include "modularbase/packs/slot_layout.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <utility>

using namespace modularbase;

namespace {

PackGeometry geometry(ggml_type adapter, ggml_type expert, std::vector<int> sites = {1, 2, 5}) {
  return {.n_embd = 72,
          .d_inner = 256,
          .d_ff = 512,
          .n_expert = 8,
          .n_expert_used = 2,
          .sites = std::move(sites),
          .norm_eps = 1e-5f,
          .adapter_type = adapter,
          .expert_type = expert};
}

/// Offset and size of every tensor of a slot.
std::vector<std::pair<std::size_t, std::size_t>> tensors_of(const SlotLayout& layout,
                                                            const PackGeometry& g) {
  const std::size_t adapter = ggml_row_size(g.adapter_type, g.n_embd) * 256;
  const std::size_t out = ggml_row_size(g.adapter_type, g.d_inner) * 72;
  const std::size_t experts = 8 * layout.expert_bytes;
  std::vector<std::pair<std::size_t, std::size_t>> tensors;
  for (const SlotLayout::Site& site : layout.sites) {
    tensors.insert(tensors.end(), {{site.in, adapter},
                                   {site.norm, 256 * 4},
                                   {site.router, 256 * 8 * 4},
                                   {site.token_gate, 72 * 4},
                                   {site.token_bias, 4},
                                   {site.expert_gate, experts},
                                   {site.expert_up, experts},
                                   {site.expert_down, experts},
                                   {site.out, out}});
  }
  return tensors;
}

}  // namespace

TEST_CASE("tensors are aligned, lie apart and fill the slot") {
  for (const ggml_type adapter : {GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_F32}) {
    for (const ggml_type expert : {GGML_TYPE_Q4_K, GGML_TYPE_Q4_0, GGML_TYPE_Q8_0, GGML_TYPE_F16}) {
      const PackGeometry g = geometry(adapter, expert);
      const SlotLayout layout(g);
      CHECK(layout.sites.size() == 3);
      CHECK(layout.expert_bytes == ggml_row_size(expert, 256) * 512);
      CHECK(layout.expert_bytes == ggml_row_size(expert, 512) * 256);  // W_down
      auto tensors = tensors_of(layout, g);
      std::ranges::sort(tensors);
      std::size_t end = 0;
      for (const auto& [offset, n_bytes] : tensors) {
        CHECK(offset % 64 == 0);
        CHECK(offset >= end);
        CHECK(offset < end + 64);  // nothing but alignment between them
        end = offset + n_bytes;
      }
      CHECK(layout.slot_bytes >= end);
      CHECK(layout.slot_bytes < end + 64 + layout.expert_bytes);
    }
  }
}

TEST_CASE("a slot is a whole number of experts, so that matrices of all slots are one tensor") {
  const SlotLayout layout(geometry(GGML_TYPE_F16, GGML_TYPE_Q4_K));
  CHECK(layout.slot_bytes % layout.expert_bytes == 0);
  CHECK(layout.slot_bytes % 64 == 0);
  CHECK(layout.experts_per_slot() * layout.expert_bytes == layout.slot_bytes);
  CHECK(layout.experts_per_slot() >= 3 * 3 * 8);
}

TEST_CASE("equal geometries have equal layouts, whatever the layers") {
  const SlotLayout a(geometry(GGML_TYPE_F16, GGML_TYPE_Q8_0, {0, 1}));
  const SlotLayout b(geometry(GGML_TYPE_F16, GGML_TYPE_Q8_0, {7, 9}));
  CHECK(a.slot_bytes == b.slot_bytes);
  CHECK(a.sites[1].out == b.sites[1].out);
}
