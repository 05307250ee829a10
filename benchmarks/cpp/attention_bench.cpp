// Our attention against ggml's, with its flash attention and without: same shapes, same thread
// pool, interleaved. The caches of many layers take turns, so that keys and values come from memory
// as they do in a model; the fastest layer of all rounds counts. One thread is timed by its own CPU
// clock, more by the wall's. ggml's caches have the layout that llama.cpp gives them. Usage:
// attention_bench [format|all] [heads|all] [n_rounds] [case|all]
#include <ggml-cpu.h>
#include <ggml.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <deque>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "modularbase/kernels/attention.h"
#include "modularbase/kernels/attention_scratch.h"

namespace {

namespace kernels = modularbase::kernels;
using kernels::kBlockTokens;

struct Heads {
  const char* name;
  std::int64_t n_head;
  std::int64_t n_head_kv;
  std::int64_t head_dim;
};
const std::vector<Heads> kHeads = {
    {"9/3x64", 9, 3, 64}, {"14/2x64", 14, 2, 64}, {"32/4x64", 32, 4, 64}, {"16/8x128", 16, 8, 128}};

struct Case {
  const char* name;
  int n_sequences;
  int n_rows;  // of each sequence
  int pos0;
};
const std::vector<Case> kCases = {
    {"decode_128", 1, 1, 127},        {"decode_512", 1, 1, 511},
    {"decode_4096", 1, 1, 4095},      {"decode_8192", 1, 1, 8191},
    {"decode_8x1024", 8, 1, 1023},    {"verify_4_at_4096", 1, 4, 4096},
    {"verify_8_at_4096", 1, 8, 4096}, {"tail_16_at_4096", 1, 16, 4096},
    {"prefill_512", 1, 512, 0},       {"prefill_512_at_4096", 1, 512, 4096}};

/// What the keys and values are kept in: ours, and ggml's for the others.
struct Format {
  const char* name;
  ggml_type type;
  kernels::KvTier tier;  // of what is not among the last positions, which are exact
  kernels::TileFormat k;
  kernels::TileFormat v;
};
const std::vector<Format> kFormats = {
    {"f16", GGML_TYPE_F16, kernels::kExactTier, kernels::TileFormat::kF16,
     kernels::TileFormat::kF16},
    {"bf16", GGML_TYPE_BF16, kernels::kExactTier, kernels::TileFormat::kBF16,
     kernels::TileFormat::kBF16},
    {"q8_0", GGML_TYPE_Q8_0, kernels::kExactTier, kernels::TileFormat::kQ8Keys,
     kernels::TileFormat::kQ8_0},
    {"q4", GGML_TYPE_Q4_0, kernels::kImportantTier, kernels::TileFormat::kQ4Keys,
     kernels::TileFormat::kQ4Values},
    {"q8k_q4v", GGML_TYPE_Q4_0, kernels::kImportantTier, kernels::TileFormat::kQ8Keys,
     kernels::TileFormat::kQ4Values}};
constexpr int kWindow = 128;  // exact positions at the end, where the rest are segments

constexpr std::size_t kColdBytes = 128u << 20;  // far more than the last-level cache
constexpr std::size_t kGraphBytes = 1536u
                                    << 10;  // one timing: long enough to hide the start of the pool

struct ContextFree {
  void operator()(ggml_context* context) const { ggml_free(context); }
};
using ContextPtr = std::unique_ptr<ggml_context, ContextFree>;

std::int64_t n_positions(const Case& c) {
  return c.pos0 + c.n_rows;
}
std::int64_t n_blocks(const Case& c) {
  return c.n_sequences * ((n_positions(c) + kBlockTokens - 1) / kBlockTokens);
}

struct OurNode {
  kernels::AttentionArgs args{};
  std::atomic<int> next_chunk{0};
};

void run_node(ggml_tensor* dst, int ith, int nth, void* userdata) {
  auto* node = static_cast<OurNode*>(userdata);
  kernels::AttentionArgs args = node->args;
  args.out = static_cast<float*>(dst->data);
  args.next_chunk = &node->next_chunk;
  kernels::attention(args, ith, nth);
}

/// Some layers, one graph for each contender.
struct Graphs {
  ggml_cgraph* flash;
  ggml_cgraph* plain;  // or null
  ggml_cgraph* ours;
};

struct Best {
  double flash = std::numeric_limits<double>::infinity();  // seconds of a layer
  double plain = flash;
  double ours = flash;
};

/// The caches of some layers in both layouts.
class Workload {
 public:
  Workload(const Case& c, const Heads& heads, const Format& format)
      : case_(c), heads_(heads), format_(format), type_(format.type) {
    const std::size_t cache_bytes = static_cast<std::size_t>(n_blocks(c) * heads.n_head_kv) *
                                    (kernels::tile_bytes(format.k, heads.head_dim) +
                                     kernels::tile_bytes(format.v, heads.head_dim));
    const bool is_short = c.n_rows <= 16;
    n_layers_ = is_short ? static_cast<int>(kGraphBytes / cache_bytes) + 1 : 1;
    const int n_graphs = is_short ? static_cast<int>(kColdBytes / cache_bytes) / n_layers_ + 1 : 1;
    const std::size_t exact_bytes = format.tier == kernels::kExactTier ? 0 : 4 * cache_bytes;
    const auto n_scores =
        static_cast<std::size_t>(n_positions(c) * c.n_rows * heads.n_head * c.n_sequences);
    const std::size_t n_nodes = static_cast<std::size_t>(n_layers_) * 16;
    const std::size_t n_bytes =
        n_layers_ * (5 * cache_bytes + exact_bytes + 2 * n_scores * 4 + (1 << 18)) +
        n_nodes * ggml_tensor_overhead() + 3 * ggml_graph_overhead_custom(n_nodes, false);
    context_.reset(ggml_init({n_graphs * n_bytes + (64u << 20), nullptr, false}));
    make_batch();
    for (int i = 0; i < n_graphs; ++i) add_graphs(n_nodes);
    scratch_.plan(batch_, heads.n_head, heads.n_head_kv, heads.head_dim);
  }

  void run(ggml_threadpool* pool, int n_threads, Best& best) {
    for (const Graphs& graphs : graphs_) {
      best.flash = std::min(best.flash, compute(graphs.flash, pool, n_threads));
      if (graphs.plain) best.plain = std::min(best.plain, compute(graphs.plain, pool, n_threads));
      for (OurNode& node : nodes_) node.next_chunk.store(0, std::memory_order_relaxed);
      best.ours = std::min(best.ours, compute(graphs.ours, pool, n_threads));
    }
  }
  /// Multiplications that causal attention needs, of a layer.
  double n_macs() const {
    const double n_pairs =
        case_.n_rows * (case_.pos0 + (case_.n_rows + 1) / 2.0) * case_.n_sequences;
    return n_pairs * static_cast<double>(2 * heads_.n_head * heads_.head_dim);
  }
  /// K and V of the positions, of a layer, in our format.
  double n_bytes() const {
    const double n_tiles = static_cast<double>(n_positions(case_) * case_.n_sequences) /
                           kBlockTokens * static_cast<double>(heads_.n_head_kv);
    return n_tiles * static_cast<double>(kernels::tile_bytes(format_.k, heads_.head_dim) +
                                         kernels::tile_bytes(format_.v, heads_.head_dim));
  }

 private:
  void make_batch() {
    const int per_sequence = static_cast<int>(n_blocks(case_)) / case_.n_sequences;
    table_.resize(static_cast<std::size_t>(n_blocks(case_)));
    std::iota(table_.begin(), table_.end(), 0);
    std::shuffle(table_.begin(), table_.end(), std::mt19937(1));
    for (int s = 0; s < case_.n_sequences; ++s) {
      kernels::AttentionSpan span{s * case_.n_rows, case_.n_rows, case_.pos0,
                                  table_.data() + s * per_sequence};
      if (format_.tier != kernels::kExactTier) add_segments(span);
      spans_.push_back(span);
    }
    batch_ = {spans_.data(), case_.n_sequences, case_.n_sequences * case_.n_rows, nullptr, nullptr};
    const std::int64_t n_kv = n_positions(case_);
    mask_ =
        ggml_new_tensor_4d(context_.get(), GGML_TYPE_F16, n_kv, case_.n_rows, 1, case_.n_sequences);
    auto* at = static_cast<ggml_fp16_t*>(mask_->data);
    for (std::int64_t i = 0; i < ggml_nelements(mask_); ++i) {
      const std::int64_t row = i / n_kv % case_.n_rows;
      at[i] = ggml_fp32_to_fp16(i % n_kv <= case_.pos0 + row ? 0.0f : -INFINITY);
    }
    qkv_ = filled(GGML_TYPE_F32, heads_.head_dim, heads_.n_head + 2 * heads_.n_head_kv,
                  case_.n_rows, case_.n_sequences);
  }

  // All whole blocks before the window.
  void add_segments(kernels::AttentionSpan& span) {
    span.first = std::max(0, case_.pos0 - kWindow) / kBlockTokens * kBlockTokens;
    std::vector<kernels::KvSegment>& segments = segments_.emplace_back();
    for (int i = 0; i < span.first / kBlockTokens; ++i) {
      segments.push_back({~std::uint64_t{0}, format_.tier, span.block_table[i]});
    }
    span.segments = segments.data();
    span.n_segments = static_cast<std::int32_t>(segments.size());
  }

  /// Blocks of a layer, each the heads' keys and then their values; all tiles alike.
  kernels::KvTierLayer tier(kernels::TileFormat k, kernels::TileFormat v) {
    std::vector<std::byte> block;
    const auto add = [&](kernels::TileFormat format) {
      std::vector<float> rows(static_cast<std::size_t>(kBlockTokens * heads_.head_dim));
      for (float& value : rows) value = random();
      std::vector<std::byte> tile(kernels::tile_bytes(format, heads_.head_dim));
      kernels::write_tile(format, rows.data(), heads_.head_dim, tile.data());
      for (int i = 0; i < heads_.n_head_kv; ++i)
        block.insert(block.end(), tile.begin(), tile.end());
      return block.size();
    };
    const std::size_t values_at = add(k);
    const std::size_t n_bytes = add(v);
    ggml_tensor* pool = ggml_new_tensor_1d(context_.get(), GGML_TYPE_I8,
                                           static_cast<std::int64_t>(n_bytes) * n_blocks(case_));
    auto* begin = static_cast<std::byte*>(pool->data);
    for (std::int64_t i = 0; i < n_blocks(case_); ++i) {
      std::copy(block.begin(), block.end(), begin + static_cast<std::size_t>(i) * n_bytes);
    }
    return {.k_format = k,
            .v_format = v,
            .k = begin,
            .v = begin + values_at,
            .log_weight = nullptr,
            .block_stride = n_bytes};
  }

  float random() {
    return static_cast<float>((seed_ = seed_ * 1664525u + 1013904223u) >> 8) / (1 << 23) - 1.0f;
  }

  ggml_tensor* filled(ggml_type type, std::int64_t n0, std::int64_t n1, std::int64_t n2,
                      std::int64_t n3) {
    ggml_tensor* tensor = ggml_new_tensor_4d(context_.get(), type, n0, n1, n2, n3);
    std::vector<float> row(4096 + 32);
    for (float& v : row) v = random();
    std::vector<char> pattern(ggml_row_size(type, static_cast<std::int64_t>(row.size())));
    ggml_quantize_chunk(type, row.data(), pattern.data(), 0, 1,
                        static_cast<std::int64_t>(row.size()), nullptr);
    for (std::size_t at = 0, end = ggml_nbytes(tensor); at < end; at += pattern.size()) {
      std::copy_n(pattern.data(), std::min(pattern.size(), end - at),
                  static_cast<char*>(tensor->data) + at);
    }
    return tensor;
  }

  ggml_tensor* per_head(ggml_tensor* cache) const {  // [head_dim, n_kv, n_head_kv, n_sequences]
    return ggml_permute(context_.get(), cache, 0, 2, 1, 3);
  }

  void add_graphs(std::size_t n_nodes) {
    const auto make = [&] { return ggml_new_graph_custom(context_.get(), n_nodes, false); };
    // ggml's columns of values need whole groups of positions.
    const bool has_plain = n_positions(case_) % ggml_blck_size(type_) == 0;
    graphs_.push_back({make(), has_plain ? make() : nullptr, make()});
    for (int i = 0; i < n_layers_; ++i) add_layer(graphs_.back());
  }

  void add_layer(const Graphs& graphs) {
    ggml_context* g = context_.get();
    const std::int64_t n_kv = n_positions(case_);
    const float scale = 1.0f / std::sqrt(static_cast<float>(heads_.head_dim));
    ggml_tensor* q =
        ggml_permute(g,
                     ggml_view_4d(g, qkv_, heads_.head_dim, heads_.n_head, case_.n_rows,
                                  case_.n_sequences, qkv_->nb[1], qkv_->nb[2], qkv_->nb[3], 0),
                     0, 2, 1, 3);
    ggml_tensor* k =
        per_head(filled(type_, heads_.head_dim, heads_.n_head_kv, n_kv, case_.n_sequences));
    ggml_tensor* v =
        per_head(filled(type_, heads_.head_dim, heads_.n_head_kv, n_kv, case_.n_sequences));
    ggml_build_forward_expand(graphs.flash,
                              ggml_flash_attn_ext(g, q, k, v, mask_, scale, 0.0f, 0.0f));

    if (graphs.plain) {
      ggml_tensor* v_columns =
          filled(type_, n_kv, heads_.head_dim, heads_.n_head_kv, case_.n_sequences);
      ggml_tensor* weights = ggml_soft_max_ext(g, ggml_mul_mat(g, k, q), mask_, scale, 0.0f);
      ggml_tensor* o = ggml_mul_mat(g, v_columns, weights);
      ggml_build_forward_expand(graphs.plain, ggml_cont(g, ggml_permute(g, o, 0, 2, 1, 3)));
    }

    OurNode& node = nodes_.emplace_back();
    node.args.batch = &batch_;
    node.args.kv = {.n_head_kv = heads_.n_head_kv, .head_dim = heads_.head_dim, .tiers = {}};
    node.args.kv.tiers[format_.tier] = tier(format_.k, format_.v);
    if (format_.tier != kernels::kExactTier) {
      node.args.kv.tiers[kernels::kExactTier] =
          tier(kernels::TileFormat::kF16, kernels::TileFormat::kF16);
    }
    node.args.n_head = heads_.n_head;
    node.args.qkv_stride = qkv_->ne[0] * qkv_->ne[1];
    node.args.qkv = static_cast<const float*>(qkv_->data);
    node.args.scale = scale;
    node.args.scratch = &scratch_;
    ggml_tensor* out =
        ggml_custom_4d(g, GGML_TYPE_F32, heads_.n_head * heads_.head_dim, batch_.n_rows, 1, 1,
                       &qkv_, 1, run_node, GGML_N_TASKS_MAX, &node);
    ggml_build_forward_expand(graphs.ours, out);
  }

  /// Seconds of a layer.
  double compute(ggml_cgraph* graph, ggml_threadpool* pool, int n_threads) {
    ggml_cplan plan = ggml_graph_plan(graph, n_threads, pool);
    work_.resize(plan.work_size);
    plan.work_data = work_.data();
    const double begin = seconds(n_threads);
    ggml_graph_compute(graph, &plan);
    return (seconds(n_threads) - begin) / n_layers_;
  }

  static double seconds(int n_threads) {
    timespec now{};
    clock_gettime(n_threads == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &now);
    return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
  }

  Case case_;
  Heads heads_;
  Format format_;
  ggml_type type_;
  int n_layers_;  // of one graph
  unsigned seed_ = 1;
  ContextPtr context_;
  std::vector<std::int32_t> table_;
  std::vector<kernels::AttentionSpan> spans_;
  std::deque<std::vector<kernels::KvSegment>> segments_;
  kernels::AttentionBatch batch_{};
  kernels::AttentionScratch scratch_;
  ggml_tensor* mask_ = nullptr;
  ggml_tensor* qkv_ = nullptr;
  std::vector<Graphs> graphs_;
  std::deque<OurNode> nodes_;
  std::vector<std::uint8_t> work_;
};

void bench(const Case& c, const Heads& heads, const Format& format, int n_rounds) {
  Workload work(c, heads, format);
  for (int n_threads : {1, 2}) {
    ggml_threadpool_params params = ggml_threadpool_params_default(n_threads);
    ggml_threadpool* pool = ggml_threadpool_new(&params);
    Best best;
    for (int i = 0; i < n_rounds; ++i) work.run(pool, n_threads, best);
    ggml_threadpool_free(pool);
    std::printf("| %s | %s | %s | %d | %.1f | %.1f | %.1f | %.1f | %.1f | %.1f | %.1f |\n", c.name,
                heads.name, format.name, n_threads, best.flash * 1e6, best.plain * 1e6,
                best.ours * 1e6, work.n_bytes() / best.ours * 1e-9,
                work.n_macs() / best.ours * 1e-9, best.flash / best.ours,
                std::min(best.flash, best.plain) / best.ours);
    std::fflush(stdout);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string format_name = argc > 1 ? argv[1] : "f16";
  const std::string heads_name = argc > 2 ? argv[2] : "9/3x64";
  const int n_rounds = argc > 3 ? std::atoi(argv[3]) : 7;
  const std::string case_name = argc > 4 ? argv[4] : "all";
  ggml_cpu_init();
  std::printf(
      "| case | heads | format | threads | flash us | plain us | ours us | GB/s | GMAC/s | x flash "
      "| "
      "x best |\n");
  std::printf("|---|---|---|---|---|---|---|---|---|---|---|\n");
  for (const Format& format : kFormats) {
    if (format_name != "all" && format_name != format.name) continue;
    for (const Heads& heads : kHeads) {
      if (heads_name != "all" && heads_name != heads.name) continue;
      for (const Case& c : kCases) {
        if (case_name == "all" || std::string(c.name).find(case_name) == 0)
          bench(c, heads, format, n_rounds);
      }
    }
  }
}
