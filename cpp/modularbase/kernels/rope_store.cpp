#include <ggml-cpu.h>

#include <cmath>

#include "modularbase/kernels/attention.h"
#include "modularbase/kernels/attention_types.h"
#include "modularbase/kernels/rope.h"

namespace modularbase::kernels {
namespace {

// x = RMSNorm(x) * weight
void normalise(float* x, const float* weight, std::int64_t n, float eps) {
  double squares = 0.0;
  for (std::int64_t i = 0; i < n; ++i) squares += static_cast<double>(x[i]) * x[i];
  const float scale = 1.0f / std::sqrt(static_cast<float>(squares / static_cast<double>(n)) + eps);
  for (std::int64_t i = 0; i < n; ++i) x[i] = x[i] * scale * weight[i];
}

void rope_store_row(const RopeStoreArgs& args, const AttentionSpan& span, int row_in_span) {
  const KvLayer& kv = args.kv;
  const std::int64_t head_dim = kv.head_dim;
  const std::int64_t row = span.row0 + row_in_span;
  const int position = span.pos0 + row_in_span;
  const float* cos = args.batch->rope_cos + row * args.rope_dim / 2;
  const float* sin = args.batch->rope_sin + row * args.rope_dim / 2;
  float* q = args.qkv + row * (args.n_head + 2 * kv.n_head_kv) * head_dim;
  float* k = q + args.n_head * head_dim;
  const float* v = k + kv.n_head_kv * head_dim;
  for (std::int64_t head = 0; head < args.n_head; ++head) {
    if (args.q_norm) normalise(q + head * head_dim, args.q_norm, head_dim, args.norm_eps);
    rope_rotate(q + head * head_dim, cos, sin, args.rope_dim, args.style);
  }
  if (const std::int64_t wanted = window_row(span, args.layer, row_in_span); wanted >= 0) {
    const std::int64_t n = args.n_head * head_dim;
    ggml_cpu_fp32_to_fp16(q, span.window->queries + wanted * n, n);
  }
  const std::int32_t block = span.block_table[position / kBlockTokens];
  const int token = position % kBlockTokens;
  const KvTierLayer& tier = kv.tiers[kExactTier];
  for (std::int64_t head = 0; head < kv.n_head_kv; ++head) {
    float* key = k + head * head_dim;
    if (args.k_norm) normalise(key, args.k_norm, head_dim, args.norm_eps);
    rope_rotate(key, cos, sin, args.rope_dim, args.style);
    write_row(tier.k_format, key, head_dim, token, kv.key_tile(kExactTier, block, head));
    write_row(tier.v_format, v + head * head_dim, head_dim, token,
              kv.value_tile(kExactTier, block, head));
  }
}

}  // namespace

void rope_store(const RopeStoreArgs& args, int ith, int nth) {
  for (int i = 0; i < args.batch->n_spans; ++i) {
    const AttentionSpan& span = args.batch->spans[i];
    for (int row = 0; row < span.n_rows; ++row) {
      if ((span.row0 + row) % nth == ith) rope_store_row(args, span, row);
    }
  }
}

}  // namespace modularbase::kernels
