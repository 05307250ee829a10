#include "modularbase/graph/graph_builder.h"

#include "modularbase/core/errors.h"

namespace modularbase {
namespace {

// Each op makes at most a few tensors beside its node (views, reshapes).
constexpr std::size_t kTensorsPerNode = 3;

void run_custom_node(ggml_tensor* dst, int ith, int nth, void* node) {
  static_cast<CustomNode*>(node)->run(dst, ith, nth);
}

std::string shape_text(const std::int64_t* ne, std::size_t n) {
  std::string text = "[";
  for (std::size_t i = 0; i < n; ++i) {
    if (i) text += ", ";
    text += ne[i] < 0 ? "*" : std::to_string(ne[i]);
  }
  return text + "]";
}

}  // namespace

void expect_shape(const ggml_tensor* tensor, const std::string& what,
                  std::initializer_list<std::int64_t> ne) {
  std::size_t i = 0;
  bool same = true;
  for (const std::int64_t n : ne) {
    if (n >= 0 && tensor->ne[i] != n) same = false;
    ++i;
  }
  if (!same) {
    throw Error(what + ": expected shape " + shape_text(ne.begin(), ne.size()) + ", found " +
                shape_text(tensor->ne, ne.size()));
  }
}

Graph::Graph(std::size_t max_nodes) {
  const ggml_init_params params{.mem_size = max_nodes * kTensorsPerNode * ggml_tensor_overhead() +
                                            ggml_graph_overhead_custom(max_nodes, false),
                                .mem_buffer = nullptr,
                                .no_alloc = true};
  ctx_.reset(ggml_init(params));
  cgraph_ = ggml_new_graph_custom(ctx_.get(), max_nodes, false);
}

void Graph::allocate(const Backend& backend) {
  for (int i = 0; i < ggml_graph_n_nodes(cgraph_); ++i) {
    backend.expect_can_compute(ggml_graph_node(cgraph_, i));
  }
  allocator_ = backend.make_allocator();
  if (!ggml_gallocr_alloc_graph(allocator_.get(), cgraph_)) {
    throw DeviceError(backend.name() + ": could not allocate the graph's memory");
  }
}

void Graph::compute(Backend& backend) {
  for (const auto& node : nodes_) node->reset();
  backend.compute(cgraph_);
}

std::size_t Graph::n_bytes() const {
  return allocator_ ? ggml_gallocr_get_buffer_size(allocator_.get(), 0) : 0;
}

Tensor GraphBuilder::input(const char* name, ggml_type type, std::int64_t ne0, std::int64_t ne1) {
  Tensor tensor = ggml_new_tensor_2d(ctx_, type, ne0, ne1);
  ggml_set_name(tensor, name);
  ggml_set_input(tensor);
  return tensor;
}

Tensor GraphBuilder::output(Tensor tensor, const char* name) {
  ggml_set_name(tensor, name);
  ggml_set_output(tensor);
  expand(tensor);
  return tensor;
}

Tensor GraphBuilder::tag(Tensor tensor, const char* name, int layer) {
  ggml_format_name(tensor, "%s-%d", name, layer);
  return tensor;
}

Tensor GraphBuilder::get_rows(Tensor table, Tensor ids) {
  return ggml_get_rows(ctx_, table, ids);
}

Tensor GraphBuilder::rms_norm(Tensor x, Tensor weight, float eps) {
  expect_shape(weight, weight->name, {x->ne[0], 1});
  return ggml_mul(ctx_, ggml_rms_norm(ctx_, x, eps), weight);
}

Tensor GraphBuilder::mul_mat(Tensor weight, Tensor x) {
  expect_shape(weight, weight->name, {x->ne[0], -1});
  return ggml_mul_mat(ctx_, weight, x);
}

Tensor GraphBuilder::add(Tensor a, Tensor b) {
  expect_shape(b, b->name, {a->ne[0], b->ne[1] == 1 ? 1 : a->ne[1]});
  return ggml_add(ctx_, a, b);
}

Tensor GraphBuilder::custom(std::unique_ptr<CustomNode> node, std::int64_t ne0, std::int64_t ne1,
                            const std::vector<Tensor>& sources) {
  std::vector<Tensor> args(sources);  // ggml wants them mutable
  CustomNode* raw = graph_.nodes_.emplace_back(std::move(node)).get();
  return ggml_custom_4d(ctx_, GGML_TYPE_F32, ne0, ne1, 1, 1, args.data(),
                        static_cast<int>(args.size()), run_custom_node, GGML_N_TASKS_MAX, raw);
}

Tensor GraphBuilder::custom_inplace(std::unique_ptr<CustomNode> node, Tensor target,
                                    const std::vector<Tensor>& other_sources) {
  CustomNode* raw = graph_.nodes_.emplace_back(std::move(node)).get();
  std::vector<Tensor> args(other_sources);
  return ggml_custom_inplace(ctx_, target, args.data(), static_cast<int>(args.size()),
                             run_custom_node, GGML_N_TASKS_MAX, raw);
}

}  // namespace modularbase
