#pragma once

#include <ggml.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "modularbase/core/head_query.h"
#include "modularbase/core/types.h"

namespace modularbase::kernels {

// A decoding step needs a few logits but the full product reads the whole head. Here a 4-bit copy
// of the head is read instead. For every token it gives an upper bound of the logit that holds
// whatever the input:
//
//   w.x <= mean.x + w^.x^ + |e| |y| + rounding       (Cauchy-Schwarz on the residual e of the 4-bit
//   row)
//
// A few promising tokens are computed exactly; the k-th best of them is a threshold that no token
// with a smaller upper bound can pass. The rest, a few hundred tokens, is computed exactly as well.

/// The output head as the model file holds it.
struct HeadWeight {
  ggml_type type;    // any type ggml can dequantise and multiply on the CPU
  const void* data;  // [n_embd, n_vocab]
  std::int64_t n_embd;
  std::int64_t n_vocab;
  // Gain of the norm that makes x, or null. It only steers which columns get 8 bits (see
  // head_columns.h): without it the answers are the same, the shortlists some 60 % longer.
  const float* norm_gain = nullptr;  // [n_embd]
};

/// A low-bit copy of the head with, per row, what is needed to bound its error. Built once at load.
class HeadScreen {
 public:
  /// Null if ggml cannot multiply with this weight type on the CPU.
  static std::unique_ptr<HeadScreen> build(const HeadWeight& head, int n_threads);
  ~HeadScreen();
  std::size_t n_bytes() const;
  struct Data;
  const Data& data() const { return *data_; }

 private:
  explicit HeadScreen(std::unique_ptr<Data> data);
  std::unique_ptr<Data> data_;
};

/// Exact logits of the tokens that could answer the query, in ascending token order. Exact means
/// bit for bit what the full product gives: linear() for the weight types it supports, else ggml's
/// vec_dot (a one-row mul_mat).
struct HeadRow {
  std::vector<TokenId> ids;
  std::vector<float> logits;
  bool certified =
      false;  // false: too many tokens could matter; the caller computes the full product
};

/// Room for one step's answers; grows to the largest step seen, then is reused.
class HeadWorkspace;
struct HeadWorkspaceDeleter {
  void operator()(HeadWorkspace*) const;
};
using HeadWorkspacePtr = std::unique_ptr<HeadWorkspace, HeadWorkspaceDeleter>;
HeadWorkspacePtr make_head_workspace();
std::span<const HeadRow> head_rows(const HeadWorkspace& workspace);  // [n_rows] of the latest step

struct CertifiedHeadArgs {
  const HeadWeight* head;
  const HeadScreen* screen;
  const HeadQuery* queries;  // [n_rows]
  std::int64_t n_rows;
  const float* x;  // [n_embd, n_rows], after the output norm
  HeadWorkspace* workspace;
  std::atomic<int>* next_chunk;  // zero before each phase
};

/// Phase 1: an upper bound of every token's logit, and from it the tokens that could answer the
/// query. A thread waits for chunks that others have begun, so all nth threads must be running or
/// done, never queued behind ith.
void head_screen(const CertifiedHeadArgs& args, int ith, int nth);
/// Phase 2, after all threads left phase 1: exact logits of those tokens.
void head_refine(const CertifiedHeadArgs& args, int ith, int nth);

}  // namespace modularbase::kernels
