#include "modularbase/models/linear.h"

#include "modularbase/kernels/fused_nodes.h"

namespace modularbase {
namespace {

bool can_fuse(KernelPath path, const std::vector<Linear>& linears) {
  if (path != KernelPath::kFused) return false;
  for (const Linear& linear : linears) {
    if (linear.weight->type != linears[0].weight->type) return false;
  }
  return kernels::linear_supported(linears[0].weight->type);
}

kernels::LinearOp fused_op(const std::vector<Linear>& linears, kernels::Epilogue epilogue) {
  kernels::LinearOp op{.weights = {}, .biases = {}, .epilogue = epilogue};
  for (const Linear& linear : linears) {
    op.weights.push_back(linear.weight);
    op.biases.push_back(linear.bias);
  }
  return op;
}

Tensor reference_linear(GraphBuilder& g, const Linear& linear, Tensor x) {
  Tensor y = g.mul_mat(linear.weight, x);
  return linear.bias ? g.add(y, linear.bias) : y;
}

}  // namespace

Tensor build_linear(GraphBuilder& g, KernelPath path, const std::vector<Linear>& linears,
                    Tensor x) {
  if (can_fuse(path, linears)) {
    return kernels::linear_node(g, fused_op(linears, kernels::Epilogue::kNone), x, nullptr);
  }
  Tensor y = reference_linear(g, linears[0], x);
  for (std::size_t i = 1; i < linears.size(); ++i) {
    y = ggml_concat(g.ctx(), y, reference_linear(g, linears[i], x), 0);
  }
  return y;
}

Tensor build_linear_add(GraphBuilder& g, KernelPath path, const Linear& linear, Tensor x,
                        Tensor residual) {
  if (can_fuse(path, {linear})) {
    return kernels::linear_node(g, fused_op({linear}, kernels::Epilogue::kAddResidual), x,
                                residual);
  }
  return g.add(reference_linear(g, linear, x), residual);
}

Tensor build_swiglu(GraphBuilder& g, KernelPath path, const Linear& gate, const Linear& up,
                    Tensor x) {
  if (can_fuse(path, {gate, up})) {
    return kernels::linear_node(g, fused_op({gate, up}, kernels::Epilogue::kSwiGlu), x, nullptr);
  }
  return ggml_swiglu_split(g.ctx(), reference_linear(g, gate, x), reference_linear(g, up, x));
}

}  // namespace modularbase
