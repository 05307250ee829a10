#include "modularbase/packs/slot_layout.h"

namespace modularbase {
namespace {

constexpr std::size_t kAlignment = 64;  // a cache line

std::size_t matrix_bytes(ggml_type type, std::int64_t n_in, std::int64_t n_out) {
  return ggml_row_size(type, n_in) * static_cast<std::size_t>(n_out);
}

std::size_t round_up(std::size_t n, std::size_t unit) {
  return (n + unit - 1) / unit * unit;
}

}  // namespace

SlotLayout::SlotLayout(const PackGeometry& geometry) {
  const auto& [n_embd, d_inner, d_ff, n_expert, n_used, layers, eps, adapter, expert] = geometry;
  std::size_t at = 0;
  const auto place = [&](std::size_t n_bytes) {
    const std::size_t offset = at;
    at = round_up(at + n_bytes, kAlignment);
    return offset;
  };
  // d_inner and d_ff are multiples of a block, so that all three matrices have the same size.
  expert_bytes = matrix_bytes(expert, d_inner, d_ff);
  const std::size_t experts_bytes = expert_bytes * static_cast<std::size_t>(n_expert);
  const std::size_t adapter_bytes = matrix_bytes(adapter, n_embd, d_inner);
  for (std::size_t i = 0; i < layers.size(); ++i) {
    Site site{};  // in the order in which a step reads them
    site.in = place(adapter_bytes);
    site.norm = place(matrix_bytes(GGML_TYPE_F32, d_inner, 1));
    site.router = place(matrix_bytes(GGML_TYPE_F32, d_inner, n_expert));
    site.token_gate = place(matrix_bytes(GGML_TYPE_F32, n_embd, 1));
    site.token_bias = place(sizeof(float));
    site.expert_gate = place(experts_bytes);
    site.expert_up = place(experts_bytes);
    site.expert_down = place(experts_bytes);
    site.out = place(adapter_bytes);
    sites.push_back(site);
  }
  slot_bytes = round_up(at, expert_bytes);
}

}  // namespace modularbase
