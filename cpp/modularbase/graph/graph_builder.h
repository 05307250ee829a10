#pragma once

#include <ggml.h>

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "modularbase/graph/backend.h"

namespace modularbase {

using Tensor = ggml_tensor*;

/// The arguments of one custom node. Lives as long as its graph; `run` is called by every compute
/// thread.
class CustomNode {
 public:
  virtual ~CustomNode() = default;
  virtual void run(ggml_tensor* dst, int ith, int nth) = 0;
  /// Called once before each computation of the graph (work counters go back to zero).
  virtual void reset() {}
};

/// A graph with everything that must live as long as it: tensor headers, custom nodes, memory.
class Graph {
 public:
  explicit Graph(std::size_t max_nodes);
  void allocate(const Backend& backend);
  void compute(Backend& backend);

  ggml_context* ctx() const { return ctx_.get(); }
  ggml_cgraph* cgraph() const { return cgraph_; }
  std::size_t n_bytes() const;

 private:
  friend class GraphBuilder;
  ContextPtr ctx_;
  ggml_cgraph* cgraph_;
  GallocrPtr allocator_;
  std::vector<std::unique_ptr<CustomNode>> nodes_;
};

/// Named, shape-checked operations. Building is pure: nothing is computed, read or allocated but
/// headers. A wrong shape is an Error that names the tensor; ggml's own checks abort the process.
class GraphBuilder {
 public:
  explicit GraphBuilder(Graph& graph) : graph_(graph), ctx_(graph.ctx()) {}

  ggml_context* ctx() const { return ctx_; }

  /// A tensor the runner fills before each computation.
  Tensor input(const char* name, ggml_type type, std::int64_t ne0, std::int64_t ne1 = 1);
  /// Marks a tensor as read by the runner afterwards and adds it to the graph.
  Tensor output(Tensor tensor, const char* name);
  /// Adds a node that nothing later depends on (a write into the KV cache).
  void expand(Tensor tensor) { ggml_build_forward_expand(graph_.cgraph(), tensor); }
  /// Names a block boundary "name-layer", as llama.cpp does, so that tests can compare node by
  /// node.
  Tensor tag(Tensor tensor, const char* name, int layer);

  Tensor get_rows(Tensor table, Tensor ids);            // [ne0, n_rows], [n_ids] -> [ne0, n_ids]
  Tensor rms_norm(Tensor x, Tensor weight, float eps);  // [n_embd, n_rows], [n_embd]
  Tensor mul_mat(Tensor weight, Tensor x);              // [n_in, n_out], [n_in, n] -> [n_out, n]
  Tensor add(Tensor a, Tensor b);                       // same shape, or b broadcast over rows

  /// A node computed by our own code on the CPU.
  Tensor custom(std::unique_ptr<CustomNode> node, std::int64_t ne0, std::int64_t ne1,
                const std::vector<Tensor>& sources);
  /// The same, writing into its first source.
  Tensor custom_inplace(std::unique_ptr<CustomNode> node, Tensor target,
                        const std::vector<Tensor>& other_sources = {});

 private:
  Graph& graph_;
  ggml_context* ctx_;
};

/// \throws Error "what: expected [a, b], found [c, d]" unless the first dimensions are these (-1:
/// any).
void expect_shape(const ggml_tensor* tensor, const std::string& what,
                  std::initializer_list<std::int64_t> ne);

}  // namespace modularbase
