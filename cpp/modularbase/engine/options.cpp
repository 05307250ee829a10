#include "modularbase/engine/options.h"

#include <sched.h>

#include <algorithm>
#include <array>
#include <utility>

#include "modularbase/core/errors.h"

namespace modularbase {
namespace {

constexpr int kMaxBatch = 8192;
constexpr int kMaxSequences = 4096;
// A draft that was not accepted is taken back: it must not have left the window.
constexpr std::int64_t kMinWindowTokens = 128;

int n_usable_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return 1;
  return std::max(1, CPU_COUNT(&set));
}

template <class T, std::size_t N>
T choose(const char* field, const std::string& value,
         const std::array<std::pair<const char*, T>, N>& choices) {
  std::string expected;
  for (const auto& [name, result] : choices) {
    if (value == name) return result;
    expected += expected.empty() ? name : std::string(" or ") + name;
  }
  throw InvalidRequestError(field, expected, value);
}

int in_range(const char* field, int value, int low, int high) {
  if (value < low || value > high) {
    throw InvalidRequestError(field, std::to_string(low) + ".." + std::to_string(high),
                              std::to_string(value));
  }
  return value;
}

}  // namespace

ResolvedOptions resolve_options(const EngineOptions& o) {
  using Paths = std::array<std::pair<const char*, KernelPath>, 2>;
  constexpr Paths kPaths{{{"fused", KernelPath::kFused}, {"reference", KernelPath::kReference}}};
  constexpr std::array<std::pair<const char*, HeadPath>, 2> kHeads{
      {{"certified", HeadPath::kCertified}, {"full", HeadPath::kFull}}};
  constexpr std::array<std::pair<const char*, bool>, 2> kSwitch{{{"on", true}, {"off", false}}};
  struct Kv {
    ggml_type type;
    KvMode mode;
  };
  constexpr std::array<std::pair<const char*, Kv>, 5> kKvs{
      {{"f16", {GGML_TYPE_F16, KvMode::kExact}},
       {"bf16", {GGML_TYPE_BF16, KvMode::kExact}},
       {"q8_0", {GGML_TYPE_Q8_0, KvMode::kExact}},
       {"q4_0", {GGML_TYPE_F16, KvMode::kImportant}},
       {"tiered", {GGML_TYPE_F16, KvMode::kTiered}}}};
  const Kv kv = choose("kv", o.kv, kKvs);
  if (o.kv_window_tokens < kMinWindowTokens) {
    throw InvalidRequestError("kv_window_tokens", "at least " + std::to_string(kMinWindowTokens),
                              std::to_string(o.kv_window_tokens));
  }
  if (o.pack_budget_bytes < 0) {
    throw InvalidRequestError("pack_budget_bytes", "at least 0",
                              std::to_string(o.pack_budget_bytes));
  }
  const int n_cores = n_usable_cores();
  return {.attention = choose("attention", o.attention, kPaths),
          .linear = choose("linear", o.linear, kPaths),
          .sites = choose("sites", o.sites, kPaths),
          .head = choose("head", o.head, kHeads),
          .prefix_cache = choose("prefix_cache", o.prefix_cache, kSwitch),
          .kv_type = kv.type,
          .tiers = {kv.mode, o.kv_window_tokens},
          .kv_detail_heads = o.kv_detail_heads,
          // More compute threads than cores would wait for each other at every barrier.
          .n_threads = o.n_threads == 0 ? n_cores : in_range("n_threads", o.n_threads, 1, n_cores),
          .pack_budget_bytes = o.pack_budget_bytes,
          .n_batch = in_range("n_batch", o.n_batch, 1, kMaxBatch),
          .n_sequences = in_range("n_sequences", o.n_sequences, 1, kMaxSequences)};
}

KernelPath attention_path(const ResolvedOptions& options, std::int64_t head_dim,
                          const Backend& backend) {
  const bool can_fuse = backend.is_cpu() && kernels::attention_supported(head_dim);
  return can_fuse ? options.attention : KernelPath::kReference;
}

}  // namespace modularbase
