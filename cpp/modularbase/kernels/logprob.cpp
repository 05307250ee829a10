#include "modularbase/kernels/logprob.h"

#include <algorithm>
#include <cmath>

#include "modularbase/kernels/simd.h"

namespace modularbase::kernels {
namespace {

// Sum of e^(values - largest), in float over short runs and in double over the runs.
double sum_exp(const float* values, std::int64_t n, float largest) {
  constexpr std::int64_t kRun = 64 * simd::kLanes;
  const simd::Vec shift = simd::set1(-largest);
  double sum = 0.0;
  for (std::int64_t run = 0; run < n; run += kRun) {
    const std::int64_t end = std::min(n, run + kRun);
    simd::Vec lanes = simd::zero();
    std::int64_t i = run;
    for (; i + simd::kLanes <= end; i += simd::kLanes) {
      lanes = lanes + simd::exp(simd::load(values + i) + shift);
    }
    float partial[simd::kLanes];
    simd::store(partial, lanes);
    for (const float value : partial) sum += value;
    for (; i < end; ++i) sum += std::exp(values[i] - largest);
  }
  return sum;
}

class TargetLogprobNode final : public CustomNode {
 public:
  void run(ggml_tensor* dst, int ith, int nth) override {
    const ggml_tensor* logits = dst->src[0];
    const auto* targets = static_cast<const TokenId*>(dst->src[1]->data);
    const std::int64_t n_vocab = logits->ne[0];
    for (std::int64_t row = ith; row < logits->ne[1]; row += nth) {
      const float* values = static_cast<const float*>(logits->data) + row * n_vocab;
      static_cast<float*>(dst->data)[row] = target_logprob(values, n_vocab, targets[row]);
    }
  }
};

}  // namespace

float target_logprob(const float* logits, std::int64_t n_vocab, TokenId target) {
  const float largest = *std::max_element(logits, logits + n_vocab);
  const double sum = sum_exp(logits, n_vocab, largest);
  return static_cast<float>(logits[target] - largest - std::log(sum));
}

Tensor target_logprob_node(GraphBuilder& g, Tensor logits, Tensor targets) {
  expect_shape(targets, "targets", {logits->ne[1], 1});
  return g.custom(std::make_unique<TargetLogprobNode>(), 1, logits->ne[1], {logits, targets});
}

Tensor target_logprob_reference(GraphBuilder& g, Tensor logits, Tensor targets) {
  const std::int64_t n_vocab = logits->ne[0], n_rows = logits->ne[1];
  expect_shape(targets, "targets", {n_rows, 1});
  ggml_context* ctx = g.ctx();
  // Of every row the value at its id: [1, n_rows].
  const auto pick = [&](Tensor rows, Tensor ids) {
    Tensor values = ggml_reshape_3d(ctx, rows, 1, n_vocab, n_rows);
    values = ggml_get_rows(ctx, values, ggml_reshape_2d(ctx, ids, 1, n_rows));
    return ggml_reshape_2d(ctx, values, 1, n_rows);
  };
  Tensor shifted = ggml_sub(ctx, logits, pick(logits, ggml_argmax(ctx, logits)));
  Tensor sum = ggml_sum_rows(ctx, ggml_exp(ctx, shifted));  // [1, n_rows]
  return ggml_sub(ctx, pick(shifted, targets), ggml_log(ctx, sum));
}

}  // namespace modularbase::kernels
