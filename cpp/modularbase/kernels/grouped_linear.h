#pragma once

#include <ggml.h>

#include <atomic>
#include <cstdint>
#include <span>

namespace modularbase::kernels {

/// Entries [first, first + n) of the lists below, which share weights.
struct RowGroup {
  const void* weight;     // [n_in, n_out]
  const void* up_weight;  // of the same shape, for y = silu(W x) * (U x), else null
  std::int32_t first;
  std::int32_t n;
};

/// Rows of a batch that are multiplied with different weights of one type and shape: entry i takes
/// row x_rows[i] of x and gives row y_rows[i] of y.
struct GroupedLinearArgs {
  ggml_type type;  // linear_supported(), or Q4_0, Q8_0, Q4_K with n_in a multiple of 256
  std::int64_t n_in;
  std::int64_t n_out;
  std::span<const RowGroup> groups;
  const std::int32_t* x_rows;
  const std::int32_t* y_rows;
  const float* x;                  // [n_in, *]
  float* y;                        // [n_out, *]
  const float* amounts = nullptr;  // of each entry: y += amount * W x instead; y rows differ then
  std::atomic<int>* next_chunk;    // zero before the call
};

/// y = W x, or silu(W x) * (U x), or y += amount * W x, for every entry. Called by every thread of
/// nth; returns when this thread finds no work left. A row's result does not depend on the other
/// rows (see linear()).
void grouped_linear(const GroupedLinearArgs& args, int nth);

}  // namespace modularbase::kernels
