#include "modularbase/kv/tier_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <utility>

namespace modularbase {

std::size_t TierGeometry::layer_bytes(std::size_t layer) const {
  if (!holds(layer)) return 0;
  const std::size_t log_weight_bytes = has_log_weights ? kernels::kBlockTokens * sizeof(float) : 0;
  return static_cast<std::size_t>(n_head_kv) *
         (kernels::tile_bytes(k_formats[layer], head_dim) +
          kernels::tile_bytes(v_format, head_dim) + log_weight_bytes);
}

std::size_t TierGeometry::block_bytes() const {
  std::size_t n = 0;
  for (std::size_t layer = 0; layer < k_formats.size(); ++layer) n += layer_bytes(layer);
  return n;
}

TierMemory::TierMemory(TierGeometry geometry, std::int64_t n_blocks, const Backend& backend)
    : geometry_(std::move(geometry)),
      block_bytes_(geometry_.block_bytes()),
      ctx_(make_tensor_context(1)) {
  // A group none of whose layers has the tier has blocks all the same, of no bytes.
  const auto n_bytes = std::max<std::int64_t>(1, static_cast<std::int64_t>(block_bytes_));
  pool_ = ggml_new_tensor_2d(ctx_.get(), GGML_TYPE_I8, n_bytes, n_blocks);
  ggml_set_name(pool_, "cache_tier");
  buffer_ = backend.allocate(ctx_.get(), "a tier of the KV cache");
  std::size_t offset = 0;
  for (std::size_t layer = 0; layer < geometry_.k_formats.size(); ++layer) {
    offsets_.push_back(offset);
    offset += geometry_.layer_bytes(layer);
  }
}

kernels::KvTierLayer TierMemory::layer(int layer) const {
  const auto index = static_cast<std::size_t>(layer - geometry_.first_layer);
  if (!geometry_.holds(index)) return {};
  const auto n_head = static_cast<std::size_t>(geometry_.n_head_kv);
  const kernels::TileFormat k_format = geometry_.k_formats.at(index);
  auto* k = static_cast<std::byte*>(pool_->data) + offsets_[index];
  auto* v = k + n_head * kernels::tile_bytes(k_format, geometry_.head_dim);
  auto* log_weight = v + n_head * kernels::tile_bytes(geometry_.v_format, geometry_.head_dim);
  return {k_format,    geometry_.v_format, k, v, geometry_.has_log_weights ? log_weight : nullptr,
          block_bytes_};
}

std::span<std::byte> TierMemory::block_data(BlockId block) const {
  auto* first = static_cast<std::byte*>(pool_->data);
  return {first + static_cast<std::size_t>(block) * block_bytes_, block_bytes_};
}

void TierMemory::discard(BlockId block) {
  discard_pages(block_data(block));
}

void discard_pages(std::span<std::byte> bytes) {
  const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = (reinterpret_cast<std::uintptr_t>(bytes.data()) + page - 1) / page * page;
  const auto end = (reinterpret_cast<std::uintptr_t>(bytes.data()) + bytes.size()) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

}  // namespace modularbase
