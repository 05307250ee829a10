// Our linear kernel against ggml's mul_mat: same weights, same thread pool, interleaved rounds.
// "cold": weights that come from memory, in groups of a few megabytes; the sum of each group's best
// round is reported. "hot": one set, over and over. Usage: linear_bench [f16|bf16|f32|all]
// [n_rounds] [case|all] [n_rows|0 for all] [n_threads|0 for 1 and 2]
#include <ggml-cpu.h>
#include <ggml.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "modularbase/kernels/linear.h"

namespace {

using modularbase::kernels::Epilogue;
using modularbase::kernels::LinearArgs;
using modularbase::kernels::LinearWeight;

struct Case {
  const char* name;
  std::int64_t n_in;
  std::vector<std::int64_t> n_out;
  Epilogue epilogue;
};

const std::vector<Case> kCases = {
    {"plain576", 576, {576}, Epilogue::kNone},
    {"qkv576", 576, {576, 192, 192}, Epilogue::kNone},
    {"o576", 576, {576}, Epilogue::kAddResidual},
    {"swiglu576", 576, {1536, 1536}, Epilogue::kSwiGlu},
    {"down576", 1536, {576}, Epilogue::kAddResidual},
    {"head576", 576, {49152}, Epilogue::kNone},
    {"swiglu896", 896, {4864, 4864}, Epilogue::kSwiGlu},
    {"down896", 4864, {896}, Epilogue::kAddResidual},
    {"swiglu2048", 2048, {5632, 5632}, Epilogue::kSwiGlu},
    {"down2048", 5632, {2048}, Epilogue::kAddResidual},
};

struct OurNode {
  LinearArgs args{};
  std::vector<LinearWeight> weights;
  std::atomic<int> next_chunk{0};
};

void run_node(ggml_tensor* dst, int ith, int nth, void* userdata) {
  auto* node = static_cast<OurNode*>(userdata);
  LinearArgs args = node->args;
  args.weights = node->weights.data();
  args.y = static_cast<float*>(dst->data);
  args.next_chunk = &node->next_chunk;
  modularbase::kernels::linear(args, ith, nth);
}

struct ContextFree {
  void operator()(ggml_context* context) const { ggml_free(context); }
};
using ContextPtr = std::unique_ptr<ggml_context, ContextFree>;

/// Several sets of a case's weights, and one graph for each of the two contenders that goes through
/// all of them.
class Group {
 public:
  Group(const Case& c, ggml_type type, std::int64_t n_rows, int n_sets) {
    std::int64_t n_out = 0;
    for (std::int64_t n : c.n_out) n_out += n;
    const std::size_t y_bytes = static_cast<std::size_t>(n_out * n_rows) * sizeof(float);
    const std::size_t w_bytes = ggml_row_size(type, c.n_in) * static_cast<std::size_t>(n_out);
    const std::size_t sets = static_cast<std::size_t>(n_sets);
    const std::size_t n_nodes = sets * 16;
    context_.reset(
        ggml_init({.mem_size = sets * (w_bytes + 3 * y_bytes + 4096) + 3 * y_bytes +
                               static_cast<std::size_t>(c.n_in * n_rows) * sizeof(float) +
                               n_nodes * ggml_tensor_overhead() +
                               2 * ggml_graph_overhead_custom(n_nodes, false) + (1 << 20),
                   .mem_buffer = nullptr,
                   .no_alloc = false}));
    ggml_context* g = context_.get();
    ggml_tensor* x = ggml_new_tensor_2d(g, GGML_TYPE_F32, c.n_in, n_rows);
    fill(x);
    const std::int64_t n_y = c.epilogue == Epilogue::kSwiGlu ? c.n_out[0] : n_out;
    ggml_tensor* residual = ggml_new_tensor_2d(g, GGML_TYPE_F32, n_y, n_rows);
    fill(residual);
    theirs_ = ggml_new_graph_custom(g, n_nodes, false);
    ours_ = ggml_new_graph_custom(g, n_nodes, false);
    for (int i = 0; i < n_sets; ++i) add_set(c, type, x, residual);
  }

  void time_theirs(ggml_threadpool* pool, int n_threads) {
    keep_best(best_theirs_, compute(theirs_, pool, n_threads));
  }
  void time_ours(ggml_threadpool* pool, int n_threads) {
    for (OurNode& node : nodes_) node.next_chunk.store(0, std::memory_order_relaxed);
    keep_best(best_ours_, compute(ours_, pool, n_threads));
  }
  void forget_times() { best_theirs_ = best_ours_ = std::numeric_limits<double>::infinity(); }
  double best_theirs() const { return best_theirs_; }
  double best_ours() const { return best_ours_; }

 private:
  static void keep_best(double& best, double seconds) { best = std::min(best, seconds); }

  static void fill(ggml_tensor* tensor) {
    static unsigned seed = 1;
    std::vector<float> row(static_cast<std::size_t>(tensor->ne[0]));
    for (std::int64_t r = 0; r < tensor->ne[1]; ++r) {
      for (float& v : row)
        v = static_cast<float>((seed = seed * 1664525u + 1013904223u) >> 8) / (1 << 24) - 0.5f;
      auto* dst = static_cast<char*>(tensor->data) + static_cast<std::size_t>(r) * tensor->nb[1];
      ggml_quantize_chunk(tensor->type, row.data(), dst, 0, 1, tensor->ne[0], nullptr);
    }
  }

  void add_set(const Case& c, ggml_type type, ggml_tensor* x, ggml_tensor* residual) {
    ggml_context* g = context_.get();
    OurNode& node = nodes_.emplace_back();
    std::vector<ggml_tensor*> products;
    for (std::int64_t n : c.n_out) {
      ggml_tensor* w = ggml_new_tensor_2d(g, type, c.n_in, n);
      fill(w);
      node.weights.push_back({.type = type, .data = w->data, .n_out = n});
      products.push_back(ggml_mul_mat(g, w, x));
    }
    if (c.epilogue == Epilogue::kSwiGlu)
      products = {ggml_swiglu_split(g, products[0], products[1])};
    if (c.epilogue == Epilogue::kAddResidual) products = {ggml_add(g, products[0], residual)};
    for (ggml_tensor* product : products) ggml_build_forward_expand(theirs_, product);

    node.args.n_weights = static_cast<int>(c.n_out.size());
    node.args.n_in = c.n_in;
    node.args.n_rows = x->ne[1];
    node.args.x = static_cast<const float*>(x->data);
    node.args.residual = static_cast<const float*>(residual->data);
    node.args.epilogue = c.epilogue;
    ggml_tensor* y = ggml_custom_4d(g, GGML_TYPE_F32, residual->ne[0], x->ne[1], 1, 1, &x, 1,
                                    run_node, GGML_N_TASKS_MAX, &node);
    ggml_build_forward_expand(ours_, y);
  }

  double compute(ggml_cgraph* graph, ggml_threadpool* pool, int n_threads) {
    ggml_cplan plan = ggml_graph_plan(graph, n_threads, pool);
    work_.resize(plan.work_size);
    plan.work_data = work_.data();
    const auto begin = std::chrono::steady_clock::now();
    ggml_graph_compute(graph, &plan);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }

  ContextPtr context_;
  ggml_cgraph* theirs_ = nullptr;
  ggml_cgraph* ours_ = nullptr;
  std::deque<OurNode> nodes_;
  std::vector<std::uint8_t> work_;
  double best_theirs_ = 0;
  double best_ours_ = 0;
};

struct Run {
  ggml_type type;
  std::int64_t n_rows;
  std::size_t cold_bytes;  // 0: hot
  int n_rounds;
  int only_threads;  // 0: 1 and 2
};

void bench(const Case& c, const Run& run) {
  std::int64_t n_out = 0;
  for (std::int64_t n : c.n_out) n_out += n;
  const std::size_t w_bytes = ggml_row_size(run.type, c.n_in) * static_cast<std::size_t>(n_out);
  const int n_sets =
      run.cold_bytes ? static_cast<int>(std::max<std::size_t>(1, (8u << 20) / w_bytes)) : 1;
  const std::size_t n_groups =
      std::max<std::size_t>(1, run.cold_bytes / (w_bytes * static_cast<std::size_t>(n_sets)));
  std::deque<Group> groups;
  for (std::size_t i = 0; i < n_groups; ++i) groups.emplace_back(c, run.type, run.n_rows, n_sets);
  for (int n_threads : {1, 2}) {
    if (run.only_threads && run.only_threads != n_threads) continue;
    ggml_threadpool_params params = ggml_threadpool_params_default(n_threads);
    ggml_threadpool* pool = ggml_threadpool_new(&params);
    for (Group& group : groups) group.forget_times();
    for (int i = 0; i < run.n_rounds; ++i) {
      for (Group& group : groups) group.time_theirs(pool, n_threads);
      for (Group& group : groups) group.time_ours(pool, n_threads);
    }
    ggml_threadpool_free(pool);
    double theirs = 0, ours = 0;
    for (const Group& group : groups) {
      theirs += group.best_theirs();
      ours += group.best_ours();
    }
    const double n_total = static_cast<double>(n_groups) * n_sets;
    const double gb = n_total * static_cast<double>(w_bytes) * 1e-9;
    const double gmac = n_total * static_cast<double>(n_out * c.n_in * run.n_rows) * 1e-9;
    std::printf(
        "%-10s %-5s %4lld %2d %4s | %9.1f %9.1f us | %6.1f %6.1f GB/s | %6.1f %6.1f GMAC/s | "
        "%.2f\n",
        c.name, ggml_type_name(run.type), static_cast<long long>(run.n_rows), n_threads,
        run.cold_bytes ? "cold" : "hot", theirs * 1e6 / n_total, ours * 1e6 / n_total, gb / theirs,
        gb / ours, gmac / theirs, gmac / ours, theirs / ours);
    std::fflush(stdout);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string type_name = argc > 1 ? argv[1] : "all";
  const int n_rounds = argc > 2 ? std::atoi(argv[2]) : 7;
  const std::string case_name = argc > 3 ? argv[3] : "all";
  const std::int64_t only_rows = argc > 4 ? std::atoi(argv[4]) : 0;
  const int only_threads = argc > 5 ? std::atoi(argv[5]) : 0;
  ggml_cpu_init();
  std::printf(
      "case       type  rows thr  set |      ggml      ours    |   ggml   ours      |   ggml   "
      "ours        | ratio\n");
  for (ggml_type type : {GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_F32}) {
    if (type_name != "all" && type_name != ggml_type_name(type)) continue;
    for (const Case& c : kCases) {
      if (case_name != "all" && case_name != c.name) continue;
      for (std::int64_t n_rows : {1, 2, 4, 8, 16, 64, 512}) {
        if (only_rows && only_rows != n_rows) continue;
        // Four times a large last-level cache where the way from memory is what is measured.
        const std::size_t cold_bytes = n_rows <= 16 ? 128u << 20 : 0;
        if (cold_bytes) bench(c, {type, n_rows, cold_bytes, n_rounds, only_threads});
        bench(c, {type, n_rows, 0, n_rows <= 16 ? n_rounds * 10 : n_rounds, only_threads});
      }
    }
  }
}
