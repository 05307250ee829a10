#include "modularbase/engine/kv_room.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "modularbase/core/errors.h"

namespace modularbase {
namespace {

constexpr std::int64_t kBlock = kernels::kBlockTokens;
constexpr std::int64_t kDefaultSequencesOfRoom = 2;
constexpr std::int64_t kMaxBlocks = std::int64_t{1} << 24;  // a thousand million tokens
// A key bias so many times the median layer's keeps the layer's keys in 8 bits.
constexpr double kLargeBias = 5.0;

double key_bias_norm(const Model& model, std::size_t layer) {
  const Tensor bias = model.layers[layer].attention.k.bias;
  if (!bias) return 0.0;
  std::vector<float> values(static_cast<std::size_t>(ggml_nelements(bias)));
  ggml_backend_tensor_get(bias, values.data(), 0, ggml_nbytes(bias));
  double squares = 0.0;
  for (const float value : values) squares += static_cast<double>(value) * value;
  return std::sqrt(squares);
}

std::vector<bool> wide_keys(const Model& model) {
  std::vector<double> norms;
  norms.reserve(model.layers.size());
  for (std::size_t layer = 0; layer < model.layers.size(); ++layer) {
    norms.push_back(key_bias_norm(model, layer));
  }
  std::vector<double> sorted = norms;
  std::ranges::sort(sorted);
  const double median = sorted[sorted.size() / 2];
  std::vector<bool> wide;
  wide.reserve(norms.size());
  for (const double norm : norms) wide.push_back(median > 0.0 && norm > kLargeBias * median);
  return wide;
}

std::vector<KvHead> detail_heads(const std::vector<std::pair<int, int>>& named,
                                 const ModelConfig& config) {
  std::vector<KvHead> heads;
  for (const auto& [layer, head] : named) {
    if (layer < 0 || layer >= config.n_layer || head < 0 || head >= config.n_head_kv) {
      throw InvalidRequestError("kv_detail_heads",
                                "layers 0.." + std::to_string(config.n_layer - 1) +
                                    " and KV heads 0.." + std::to_string(config.n_head_kv - 1),
                                "(" + std::to_string(layer) + ", " + std::to_string(head) + ")");
    }
    heads.push_back({layer, head});
  }
  return heads;
}

}  // namespace

std::int64_t resolve_n_blocks(std::int64_t budget_bytes, std::size_t block_bytes,
                              std::int64_t n_ctx) {
  const std::int64_t n_per_sequence = (n_ctx + kBlock - 1) / kBlock;
  const std::int64_t n = budget_bytes == 0 ? kDefaultSequencesOfRoom * n_per_sequence
                                           : budget_bytes / static_cast<std::int64_t>(block_bytes);
  if (budget_bytes < 0 || n < 1 || n > kMaxBlocks) {
    throw InvalidRequestError(
        "kv_budget_bytes",
        "1.." + std::to_string(kMaxBlocks) + " blocks of " + std::to_string(block_bytes) + " bytes",
        std::to_string(budget_bytes));
  }
  return n;
}

KvTiers resolve_tiers(const ResolvedOptions& options, const Model& model, const Backend& backend) {
  const bool is_rounded = options.kv_type == GGML_TYPE_Q8_0 || options.tiers.mode != KvMode::kExact;
  if (is_rounded && !kernels::tile_supported(kernels::TileFormat::kQ8_0, model.config.head_dim)) {
    throw InvalidRequestError("kv", "f16 or bf16, for heads that are no multiple of 32 wide",
                              "a rounded one; head_dim " + std::to_string(model.config.head_dim));
  }
  if (options.tiers.mode == KvMode::kExact) return {};
  return {
      .has_important = true,
      .has_redundant = options.tiers.mode == KvMode::kTiered,
      .wide_keys = wide_keys(model),
      .detail_heads = detail_heads(options.kv_detail_heads, model.config),
      .in_rows = attention_path(options, model.config.head_dim, backend) == KernelPath::kReference};
}

std::int64_t n_kv_tokens(const KvGroups& groups, const KvTiers& tiers, std::int64_t n_blocks,
                         const ResolvedOptions& options) {
  if (!tiers.has_important) return n_blocks * kBlock;
  // Exact: the window, a step's rows, what waits to be compacted, and the first tokens.
  const std::int64_t n_exact = (options.tiers.n_window + options.n_batch) / kBlock + 8;
  if (n_blocks <= n_exact) return n_blocks * kBlock;
  std::size_t important_bytes = important_blocks(groups.lower, tiers).block_bytes();
  if (groups.upper) important_bytes += important_blocks(*groups.upper, tiers).block_bytes();
  const auto left = static_cast<std::size_t>(n_blocks - n_exact) * groups.block_bytes();
  return (n_exact + static_cast<std::int64_t>(left / important_bytes)) * kBlock;
}

}  // namespace modularbase
