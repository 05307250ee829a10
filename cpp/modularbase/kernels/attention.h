#pragma once

#include <ggml.h>

#include <atomic>
#include <cstdint>

namespace modularbase::kernels {

inline constexpr int kBlockTokens = 64;  // tokens in one KV block

/// The keys and values of one layer. Blocks are block_stride elements apart; within one, element
/// [head][token][dim]: each (block, head) is one contiguous [head_dim, kBlockTokens] tile, so that
/// a block of another type can be a tile of other bytes.
struct KvLayer {
  ggml_type type;  // F16 or BF16
  void* k;
  void* v;
  std::int64_t n_head_kv;
  std::int64_t head_dim;
  std::int64_t block_stride;
};

/// Consecutive rows of one sequence in the batch: rows [row0, row0 + n_rows) are its tokens at
/// positions pos0, pos0 + 1, ... A row at position p sees the cache positions 0..p.
struct AttentionSpan {
  std::int32_t row0;
  std::int32_t n_rows;
  std::int32_t pos0;
  const std::int32_t* block_table;  // block of positions [64 i, 64 i + 64) at index i
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
  float* qkv;  // [(n_head + 2 n_head_kv) * head_dim, n_rows]; q is rotated in place, k and v go to
               // the cache
};

/// Normalises (qwen3) and rotates q and k; writes k and v of every row into the cache.
void rope_store(const RopeStoreArgs& args, int ith, int nth);

class AttentionScratch;

struct AttentionArgs {
  const AttentionBatch* batch;
  KvLayer kv;
  std::int64_t n_head;
  std::int64_t qkv_stride;       // floats from one row of qkv to the next
  const float* qkv;              // rotated q of each row comes first
  float scale;                   // 1 / sqrt(head_dim)
  float* out;                    // [n_head * head_dim, n_rows]
  std::atomic<int>* next_chunk;  // zero before the call
  AttentionScratch* scratch;     // planned for this batch
};

/// Whether the kernels below handle heads of this width (else the graph uses ggml's ops).
bool attention_supported(std::int64_t head_dim);

/// Causal grouped-query attention over the block table, online softmax in F32 (Dao et al.,
/// arXiv:2205.14135). Spans of a few rows run position by position, split at fixed positions and
/// merged in order, so that a row's result depends on nothing but its own sequence (bit for bit).
/// Longer spans run in tiles of rows; they agree with the former to rounding.
void attention(const AttentionArgs& args, int ith, int nth);

}  // namespace modularbase::kernels
