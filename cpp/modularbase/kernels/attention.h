#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "modularbase/kernels/kv_layer.h"

namespace modularbase::kernels {

/// One block of a sequence's compacted past; token or slot i of it is seen when bit i is set.
struct KvSegment {
  std::uint64_t visible;
  std::int32_t tier;
  std::int32_t block;
};

/// The last queries of a sequence, thinned out: row p / stride % n_rows is position p's, where
/// stride divides p.
struct QueryWindow {
  std::uint16_t* queries;  // F16 [head_dim, n_head, n_rows, n_layer], rotated
  float* log_mass;         // [n_head, n_rows, n_layer]: ln sum exp(score) over all that it saw
  std::int32_t n_rows;
  std::int32_t stride;
};

/// Consecutive rows of one sequence in the batch: rows [row0, row0 + n_rows) are its tokens at
/// positions pos0, pos0 + 1, ... A row at position p sees what its segments show and the cache
/// positions first..p.
struct AttentionSpan {
  std::int32_t row0;
  std::int32_t n_rows;
  std::int32_t pos0;
  const std::int32_t* block_table;      // exact block of positions [64 i, 64 i + 64) at index i
  std::int32_t first = 0;               // positions before it are not in the table's blocks ...
  const KvSegment* segments = nullptr;  // ... but in these
  std::int32_t n_segments = 0;
  const QueryWindow* window = nullptr;  // null: nobody wants the queries
};

/// The same for every layer of a step; filled by the runner before the graph runs.
struct AttentionBatch {
  const AttentionSpan* spans;
  int n_spans;
  std::int64_t n_rows;
  const float* rope_cos;  // [rope_dim / 2, n_rows]
  const float* rope_sin;  // [rope_dim / 2, n_rows]
};

enum class RopeStyle {
  kNormal,  // pairs (0,1), (2,3), ... : llama
  kNeox,    // pairs (i, i + rope_dim/2): qwen2, qwen3
};

struct RopeStoreArgs {
  const AttentionBatch* batch;
  KvLayer kv;
  std::int64_t n_head;
  std::int64_t rope_dim;  // <= head_dim
  RopeStyle style;
  const float* q_norm;  // [head_dim] or null (qwen3): RMSNorm of each head before the rotation
  const float* k_norm;  // [head_dim] or null
  float norm_eps;
  int layer;   // among the layers of the query windows
  float* qkv;  // [(n_head + 2 n_head_kv) * head_dim, n_rows]; q is rotated in place, k and v go to
               // the cache
};

/// Normalises (qwen3) and rotates q and k; writes k and v to the exact tier, and what windows want.
void rope_store(const RopeStoreArgs& args, int ith, int nth);

class AttentionScratch;

struct AttentionArgs {
  const AttentionBatch* batch;
  KvLayer kv;
  int layer;  // among the layers of the query windows
  std::int64_t n_head;
  std::int64_t qkv_stride;       // floats from one row of qkv to the next
  const float* qkv;              // of each row q, k, v as rope_store() left them
  float scale;                   // 1 / sqrt(head_dim)
  float* out;                    // [n_head * head_dim, n_rows]
  std::atomic<int>* next_chunk;  // zero before the call
  AttentionScratch* scratch;     // planned for this batch
};

inline constexpr std::int64_t kMaxHeadDim = 256;
/// Whether the kernels below handle heads of this width (else the graph uses ggml's ops).
bool attention_supported(std::int64_t head_dim);

/// Causal grouped-query attention over the block table, online softmax in F32 (Dao et al.,
/// arXiv:2205.14135). Spans of a few rows run position by position, split at fixed positions and
/// merged in order, so that a row's result depends on nothing but its own sequence (bit for bit).
/// Tiles of 4 and 8 bits meet queries and weights of 16 bits in integer products there.
/// Longer spans run in tiles of rows; they agree with the former to rounding, that of the cache to
/// 8 bits included: a tile takes its span's own keys and values as they were before.
void attention(const AttentionArgs& args, int ith, int nth);

}  // namespace modularbase::kernels
