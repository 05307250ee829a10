// Our linear kernel against ggml's mul_mat: same weights, same thread pool, interleaved, the minimum of several rounds.
// Usage: linear_bench [f16|bf16|f32|all] [n_threads|0 for 1 and 2] [rounds] [case name]
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

/// `n_sets` copies of a case's weights, and one graph for each of the two contenders that goes through all of them.
class Workload {
 public:
  Workload(const Case& c, ggml_type type, std::int64_t n_rows, int n_sets) {
    std::int64_t n_out = 0;
    for (std::int64_t n : c.n_out) n_out += n;
    const std::size_t y_bytes = static_cast<std::size_t>(n_out * n_rows) * sizeof(float);
    const std::size_t w_bytes = ggml_row_size(type, c.n_in) * static_cast<std::size_t>(n_out);
    const std::size_t nodes = static_cast<std::size_t>(n_sets) * 16;
    const std::size_t n_bytes = n_sets * (w_bytes + 2 * y_bytes + 4096) + 3 * y_bytes +
                                static_cast<std::size_t>(c.n_in * n_rows) * 4 + nodes * ggml_tensor_overhead() +
                                2 * ggml_graph_overhead_custom(nodes, false) + (1 << 20);
    context_.reset(ggml_init({n_bytes, nullptr, false}));
    ggml_context* g = context_.get();
    ggml_tensor* x = ggml_new_tensor_2d(g, GGML_TYPE_F32, c.n_in, n_rows);
    fill(x);
    const std::int64_t n_y = c.epilogue == Epilogue::kSwiGlu ? c.n_out[0] : n_out;
    ggml_tensor* residual = ggml_new_tensor_2d(g, GGML_TYPE_F32, n_y, n_rows);
    fill(residual);
    theirs_ = ggml_new_graph_custom(g, nodes, false);
    ours_ = ggml_new_graph_custom(g, nodes, false);
    for (int i = 0; i < n_sets; ++i) add_set(c, type, x, residual);
    n_macs_ = static_cast<double>(n_sets) * n_out * c.n_in * n_rows;
    n_weight_bytes_ = static_cast<double>(n_sets) * w_bytes;
  }

  double run_theirs(ggml_threadpool* pool, int n_threads) { return compute(theirs_, pool, n_threads); }
  double run_ours(ggml_threadpool* pool, int n_threads) {
    for (OurNode& node : nodes_) node.next_chunk.store(0, std::memory_order_relaxed);
    return compute(ours_, pool, n_threads);
  }
  double n_macs() const { return n_macs_; }
  double n_weight_bytes() const { return n_weight_bytes_; }

 private:
  static void fill(ggml_tensor* tensor) {
    static unsigned seed = 1;
    std::vector<float> row(static_cast<std::size_t>(tensor->ne[0]));
    for (std::int64_t r = 0; r < tensor->ne[1]; ++r) {
      for (float& v : row) v = static_cast<float>((seed = seed * 1664525u + 1013904223u) >> 8) / (1 << 24) - 0.5f;
      auto* dst = static_cast<char*>(tensor->data) + r * tensor->nb[1];
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
    if (c.epilogue == Epilogue::kSwiGlu) products = {ggml_swiglu_split(g, products[0], products[1])};
    if (c.epilogue == Epilogue::kAddResidual) products = {ggml_add(g, products[0], residual)};
    for (ggml_tensor* product : products) ggml_build_forward_expand(theirs_, product);

    node.args.n_weights = static_cast<int>(c.n_out.size());
    node.args.n_in = c.n_in;
    node.args.n_rows = x->ne[1];
    node.args.x = static_cast<const float*>(x->data);
    node.args.residual = static_cast<const float*>(residual->data);
    node.args.epilogue = c.epilogue;
    ggml_tensor* y = ggml_custom_4d(g, GGML_TYPE_F32, residual->ne[0], x->ne[1], 1, 1, &x, 1, run_node,
                                    GGML_N_TASKS_MAX, &node);
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
  double n_macs_ = 0;
  double n_weight_bytes_ = 0;
};

void bench(const Case& c, ggml_type type, std::int64_t n_rows, std::size_t set_bytes, int n_rounds) {
  std::size_t w_bytes = 0;
  for (std::int64_t n : c.n_out) w_bytes += ggml_row_size(type, c.n_in) * static_cast<std::size_t>(n);
  const int n_sets = static_cast<int>(std::max<std::size_t>(1, set_bytes / w_bytes));
  Workload work(c, type, n_rows, n_sets);
  for (int n_threads : {1, 2}) {
    const char* only = std::getenv("LINEAR_BENCH_THREADS");
    if (only && std::atoi(only) != n_threads) continue;
    ggml_threadpool_params params = ggml_threadpool_params_default(n_threads);
    ggml_threadpool* pool = ggml_threadpool_new(&params);
    double ours = std::numeric_limits<double>::infinity(), theirs = ours;
    for (int i = 0; i < n_rounds; ++i) {
      theirs = std::min(theirs, work.run_theirs(pool, n_threads));
      ours = std::min(ours, work.run_ours(pool, n_threads));
    }
    ggml_threadpool_free(pool);
    std::printf("%-10s %-5s %4lld %2d %4s | %9.1f %9.1f us | %6.1f %6.1f GB/s | %6.1f %6.1f GMAC/s | %.2f\n", c.name,
                ggml_type_name(type), static_cast<long long>(n_rows), n_threads, n_sets == 1 ? "hot" : "cold",
                theirs * 1e6 / n_sets, ours * 1e6 / n_sets, work.n_weight_bytes() / theirs * 1e-9,
                work.n_weight_bytes() / ours * 1e-9, work.n_macs() / theirs * 1e-9, work.n_macs() / ours * 1e-9,
                theirs / ours);
    std::fflush(stdout);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string type_name = argc > 1 ? argv[1] : "all";
  const int n_rounds = argc > 2 ? std::atoi(argv[2]) : 7;
  const std::string case_name = argc > 3 ? argv[3] : "all";
  const std::int64_t only_rows = argc > 4 ? std::atoi(argv[4]) : 0;
  ggml_cpu_init();
  std::printf("case       type  rows thr  set |   ggml      ours         |  ggml   ours        |  ggml   ours          | ratio\n");
  for (ggml_type type : {GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_F32}) {
    if (type_name != "all" && type_name != ggml_type_name(type)) continue;
    if (type_name == "all" && type == GGML_TYPE_F32) continue;
    for (const Case& c : kCases) {
      if (case_name != "all" && case_name != c.name) continue;
      for (std::int64_t n_rows : {1, 2, 4, 8, 16, 64, 512}) {
        if (only_rows && only_rows != n_rows) continue;
        // Far more than the last-level cache where the weights' way from memory matters.
        bench(c, type, n_rows, n_rows <= 16 ? 256u << 20 : n_rows <= 64 ? 64u << 20 : 4u << 20, n_rounds);
        if (n_rows <= 16) bench(c, type, n_rows, 0, n_rounds * 20);
      }
    }
  }
}
