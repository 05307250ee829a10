#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "modularbase/engine/context_tiers.h"
#include "modularbase/models/linear.h"

namespace modularbase {

/// Which way the output head is computed; the tokens are the same.
enum class HeadPath {
  kCertified,  // a low-bit screen with an error bound, exact logits where they matter
  kFull,       // the whole product
};

/// Everything Engine::load can be told. The Python dataclass of the same name has the same fields.
struct EngineOptions {
  std::string dtype = "auto";   // auto, keep, f16, bf16, f32
  std::string device = "auto";  // auto, cpu, cuda
  // How keys and values are kept: f16, bf16, q8_0; q4_0: in 4 bits behind the last
  // kv_window_tokens; tiered: so, or better or worse, as requests and plans say.
  std::string kv = "f16";
  std::int64_t kv_window_tokens = 128;
  // Tiered: (layer, kv head); these keep in 4 bits what others summarise.
  std::vector<std::pair<int, int>> kv_detail_heads;
  int n_threads = 0;       // 0: one per core this process may use
  std::int64_t n_ctx = 0;  // longest sequence; 0: what the model was trained for, at most 32768
  std::int64_t kv_budget_bytes = 0;  // memory for KV blocks; 0: room for two sequences of n_ctx
  std::int64_t pack_budget_bytes = std::int64_t{256} << 20;  // memory for packs; 0: no packs
  int first_site = -1;   // lowest layer of packs whose KV below is shared; -1: the middle layer
  int n_batch = 512;     // most rows of one step
  int n_sequences = 64;  // most requests running at once
  std::string attention = "fused";  // fused, reference
  std::string linear = "fused";     // fused, reference
  std::string sites = "fused";      // of packs: fused, reference
  std::string head = "certified";   // certified, full
  std::string prefix_cache = "on";  // on, off
};

/// The options as checked values. \throws InvalidRequestError naming the field.
struct ResolvedOptions {
  KernelPath attention;
  KernelPath linear;
  KernelPath sites;
  HeadPath head;
  bool prefix_cache;
  ggml_type kv_type;  // of exact blocks
  TierRules tiers;
  std::vector<std::pair<int, int>> kv_detail_heads;
  int n_threads;
  std::int64_t pack_budget_bytes;
  int n_batch;
  int n_sequences;
};
ResolvedOptions resolve_options(const EngineOptions& options);

/// Ours where the device and the model's heads allow it and nobody wants ggml's.
KernelPath attention_path(const ResolvedOptions& options, std::int64_t head_dim,
                          const Backend& backend);

}  // namespace modularbase
