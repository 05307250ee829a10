// A pack's sites as decoding runs them, with two or with all of their experts, for a few rows with
// one pack each. Between two sites the threads read other memory, as the base's layers do there: a
// site's weights come from where they come from in decoding. Prints microseconds a site, the median
// over the steps; of the experts alone ("experts") or with adapters, norm and router ("site").
// Usage: pack_bench experts|site PACK.gguf N_EXPERT_USED N_ROWS N_PACKS N_THREADS N_STEPS
// BYTES_BETWEEN
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <exception>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "modularbase/core/errors.h"
#include "modularbase/kernels/site_node.h"
#include "modularbase/packs/slot_pool.h"

namespace {

using namespace modularbase;
using Clock = std::chrono::steady_clock;

constexpr int kWarmUpSteps = 3;

struct Arguments {
  bool is_whole_site;
  std::string path;
  std::int64_t n_expert_used;
  std::int64_t n_rows;
  int n_packs;
  int n_threads;
  int n_steps;
  std::size_t bytes_between;
};

/// Every thread reads its part of some memory.
class ReadNode final : public CustomNode {
 public:
  ReadNode(const std::uint64_t* words, std::size_t n_words) : words_(words), n_words_(n_words) {}
  void run(ggml_tensor* dst, int ith, int nth) override {
    const auto part = [&](int i) {
      return n_words_ * static_cast<std::size_t>(i) / static_cast<std::size_t>(nth);
    };
    const std::uint64_t sum =
        std::accumulate(words_ + part(ith), words_ + part(ith + 1), std::uint64_t{0});
    if (ith == 0) *static_cast<float*>(dst->data) = static_cast<float>(sum);
  }

 private:
  const std::uint64_t* words_;
  std::size_t n_words_;
};

/// The time between two nodes: all threads have finished the one, none has begun the other.
class StampNode final : public CustomNode {
 public:
  explicit StampNode(Clock::time_point& at) : at_(at) {}
  void run(ggml_tensor*, int ith, int) override {
    if (ith == 0) at_ = Clock::now();
  }

 private:
  Clock::time_point& at_;
};

/// z [d_inner, n_uses] -> [d_ff, n_expert_used * n_uses]
class UpNode final : public kernels::SiteNode {
 public:
  using SiteNode::SiteNode;
  void run(ggml_tensor* dst, int, int nth) override {
    site_expert_up(call(nth), step_.routes, kernels::floats(dst->src[0]), kernels::floats(dst));
  }
};

/// -> [d_inner, n_expert_used * n_uses]
class DownNode final : public kernels::SiteNode {
 public:
  using SiteNode::SiteNode;
  void run(ggml_tensor* dst, int, int nth) override {
    site_expert_down(call(nth), step_.routes, kernels::floats(dst->src[0]), kernels::floats(dst));
  }
};

/// z, the experts' parts -> [d_inner, n_uses]
class MixNode final : public kernels::SiteNode {
 public:
  using SiteNode::SiteNode;
  void run(ggml_tensor* dst, int ith, int nth) override {
    const std::int64_t n_uses = dst->ne[1];
    site_mix(site_, step_.routes, kernels::floats(dst->src[0]), kernels::floats(dst->src[1]),
             n_uses * ith / nth, n_uses * (ith + 1) / nth, kernels::floats(dst));
  }
};

/// The sites of one step in one graph, with the time before and behind each.
class Step {
 public:
  explicit Step(const Arguments& arguments)
      : arguments_(arguments), backend_("cpu", arguments.n_threads), graph_(1024) {
    load();
    fill_uses();
    GraphBuilder g(graph_);
    const std::int64_t n_embd = sites_[0].in->ne[0], d_inner = sites_[0].in->ne[1];
    x_ = g.input("x", GGML_TYPE_F32, arguments.is_whole_site ? n_embd : d_inner, arguments.n_rows);
    if (arguments.is_whole_site) h_ = g.input("h", GGML_TYPE_F32, n_embd, arguments.n_rows);
    for (std::size_t i = 0; i < sites_.size(); ++i) add_site(g, i);
    graph_.allocate(backend_);
  }

  /// Microseconds a site.
  double run() {
    fill_random(x_);
    if (h_) fill_random(h_);
    for (kernels::PackPoolStep& step : steps_) choose_experts(step.routes);
    graph_.compute(backend_);
    Clock::duration sum{};
    for (std::size_t i = 0; i < sites_.size(); ++i) sum += ends_[i] - begins_[i];
    return std::chrono::duration<double, std::micro>(sum).count() /
           static_cast<double>(sites_.size());
  }

 private:
  void load() {
    const PackGeometry geometry = PackFile::open(arguments_.path).geometry();
    if (arguments_.n_expert_used > geometry.n_expert) throw Error("N_EXPERT_USED: too many");
    const Pack pack(arguments_.path, "", "bench", {geometry.n_embd, geometry.sites.back() + 1});
    pool_ = std::make_unique<SlotPool>(geometry, arguments_.n_packs + 1, backend_);
    // Equal weights in every slot: what a product takes depends on where they are alone.
    for (int slot = 1; slot <= arguments_.n_packs; ++slot) pool_->write(slot, pack);
    for (std::size_t i = 0; i < geometry.sites.size(); ++i) {
      sites_.push_back(pool_->site(i));
      sites_.back().n_expert_used = arguments_.n_expert_used;
    }
    begins_.resize(sites_.size());
    ends_.resize(sites_.size());
    allocate_between();
  }

  /// In the kind of memory that a base's weights are in.
  void allocate_between() {
    n_words_between_ = arguments_.bytes_between / sizeof(std::uint64_t);
    between_ctx_ = make_tensor_context(1);
    const auto n_words = static_cast<std::int64_t>(n_words_between_);
    between_ = ggml_new_tensor_2d(between_ctx_.get(), GGML_TYPE_I64, n_words, std::ssize(sites_));
    between_buffer_ = backend_.allocate(between_ctx_.get(), "what is read between two sites");
    ggml_backend_buffer_clear(between_buffer_.get(), 1);
  }

  void fill_uses() {
    rows_.resize(static_cast<std::size_t>(arguments_.n_rows));
    std::iota(rows_.begin(), rows_.end(), 0);
    amounts_.assign(rows_.size(), 0.1f);
    for (int pack = 0; pack < arguments_.n_packs; ++pack) {
      const auto first = [&](int i) {
        return static_cast<std::int32_t>(arguments_.n_rows * i / arguments_.n_packs);
      };
      runs_.push_back({pack + 1, first(pack), first(pack + 1) - first(pack)});
    }
    for (std::size_t i = 0; i < sites_.size(); ++i) {
      kernels::PackPoolStep& step = steps_.emplace_back();
      step.uses = {.rows = rows_, .runs = runs_, .amounts = amounts_};
      step.routes.resize(arguments_.n_rows, arguments_.n_expert_used);
    }
  }

  void add_site(GraphBuilder& g, std::size_t i) {
    const auto add = [&](std::unique_ptr<CustomNode> node) {
      g.expand(g.custom(std::move(node), 1, 1, {}));
    };
    const auto* words = static_cast<const std::uint64_t*>(between_->data);
    add(std::make_unique<ReadNode>(words + i * n_words_between_, n_words_between_));
    add(std::make_unique<StampNode>(begins_[i]));
    if (arguments_.is_whole_site) {
      g.expand(kernels::pack_add_few_node(g, sites_[i], steps_[i], arguments_.n_rows, x_, h_));
    } else {
      g.expand(experts(g, sites_[i], steps_[i]));
    }
    add(std::make_unique<StampNode>(ends_[i]));
  }

  Tensor experts(GraphBuilder& g, const SiteWeights& site, kernels::PackPoolStep& step) const {
    const std::int64_t d_inner = site.in->ne[1], d_ff = site.expert_gate->ne[1];
    const std::int64_t n_choices = arguments_.n_expert_used * arguments_.n_rows;
    Tensor hidden = g.custom(std::make_unique<UpNode>(site, step), d_ff, n_choices, {x_});
    Tensor parts = g.custom(std::make_unique<DownNode>(site, step), d_inner, n_choices, {hidden});
    return g.custom(std::make_unique<MixNode>(site, step), d_inner, arguments_.n_rows, {x_, parts});
  }

  /// Others in every step and at every site, as a router would.
  void choose_experts(kernels::PackRoutes& routes) {
    const auto n_expert = static_cast<std::size_t>(sites_[0].router->ne[1]);
    const auto n_used = static_cast<std::size_t>(arguments_.n_expert_used);
    std::vector<std::int32_t> order(n_expert);
    std::iota(order.begin(), order.end(), 0);
    for (std::size_t use = 0; use < rows_.size(); ++use) {
      std::ranges::shuffle(order, random_);
      for (std::size_t k = 0; k < n_used; ++k) {
        routes.experts[use * n_used + k] = order[k];
        routes.gains[use * n_used + k] = 1.0f / static_cast<float>(n_used);
      }
    }
  }

  void fill_random(Tensor tensor) {
    std::normal_distribution<float> normal;
    std::vector<float> values(static_cast<std::size_t>(ggml_nelements(tensor)));
    for (float& value : values) value = normal(random_);
    ggml_backend_tensor_set(tensor, values.data(), 0, ggml_nbytes(tensor));
  }

  const Arguments& arguments_;
  Backend backend_;
  std::unique_ptr<SlotPool> pool_;
  std::vector<SiteWeights> sites_;
  std::vector<std::int32_t> rows_;
  std::vector<kernels::SlotRun> runs_;
  std::vector<float> amounts_;
  std::deque<kernels::PackPoolStep> steps_;  // one a site
  ContextPtr between_ctx_;
  BufferPtr between_buffer_;
  Tensor between_ = nullptr;  // I64 [n_words_between_, n_sites]
  std::size_t n_words_between_ = 0;
  std::vector<Clock::time_point> begins_, ends_;
  std::mt19937 random_{1};
  Graph graph_;
  Tensor x_ = nullptr;  // [n_embd, n_rows], or what the experts take of it, z [d_inner, n_rows]
  Tensor h_ = nullptr;  // [n_embd, n_rows], for whole sites
};

int bench(const Arguments& arguments) {
  Step step(arguments);
  std::vector<double> times;
  for (int i = -kWarmUpSteps; i < arguments.n_steps; ++i) {
    const double us = step.run();
    if (i >= 0) times.push_back(us);
  }
  const auto middle = times.begin() + std::ssize(times) / 2;
  std::ranges::nth_element(times, middle);
  std::printf("%.3f\n", *middle);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string part = argc == 9 ? argv[1] : "";
  if (part != "experts" && part != "site") {
    std::fprintf(stderr, "usage: see the head of pack_bench.cpp\n");
    return 2;
  }
  const Arguments arguments{.is_whole_site = part == "site",
                            .path = argv[2],
                            .n_expert_used = std::atoi(argv[3]),
                            .n_rows = std::atoi(argv[4]),
                            .n_packs = std::atoi(argv[5]),
                            .n_threads = std::atoi(argv[6]),
                            .n_steps = std::atoi(argv[7]),
                            .bytes_between = std::strtoull(argv[8], nullptr, 10)};
  const bool are_rows_few =
      arguments.n_rows >= arguments.n_packs && arguments.n_rows <= kernels::kFewUses;
  if (arguments.n_expert_used < 1 || arguments.n_packs < 1 || arguments.n_threads < 1 ||
      arguments.n_steps < 1 || arguments.bytes_between < 8 || !are_rows_few) {
    std::fprintf(stderr, "pack_bench: expected N_PACKS <= N_ROWS <= 8, and numbers above 0\n");
    return 2;
  }
  try {
    return bench(arguments);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "pack_bench: %s\n", error.what());
    return 1;
  }
}
