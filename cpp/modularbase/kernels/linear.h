#pragma once

#include <ggml.h>

#include <atomic>
#include <cstdint>

namespace modularbase::kernels {

/// What is applied to the product before it is stored.
enum class Epilogue {
  kNone,
  kAddResidual,  // y = W x + b + residual
  kSwiGlu,       // two weights: y = silu(W_0 x) * (W_1 x)
};

/// Up to three weights that share their input (q|k|v, gate|up). Row-major [n_in] rows, as GGUF
/// stores them.
struct LinearWeight {
  ggml_type type;    // the same for all weights of one op; linear_supported()
  const void* data;  // [n_in, n_out]
  std::int64_t n_out;
  const float* bias = nullptr;  // [n_out] or null
};

struct LinearArgs {
  const LinearWeight* weights;
  int n_weights;
  std::int64_t n_in;
  std::int64_t n_rows;
  const float* x;         // [n_in, n_rows], contiguous
  const float* residual;  // [n_out, n_rows] or null
  float* y;               // [sum of n_out, n_rows], or [n_out, n_rows] for kSwiGlu
  Epilogue epilogue;
  std::atomic<int>*
      next_chunk;  // work counter shared by the threads of one call; zero before the call
};

/// True when this build has a kernel for the weight type (else the graph uses ggml's own mul_mat).
bool linear_supported(ggml_type type);

/// x [n] as linear() multiplies it with weights of a type: BF16 weights round it to BF16 where the
/// CPU multiplies BF16 with BF16, quantised ones to 8 bits in blocks of 32.
void round_linear_input(ggml_type type, const float* x, std::int64_t n, float* out);

/// y = epilogue(W x + b). Called by every thread ith of nth; returns when this thread finds no work
/// left. Each output element is summed in one fixed order, whatever nth or the tiling: a row's
/// result does not depend on what else is in the batch (bit for bit). One exception: where the CPU
/// has a tile unit, more than a few rows of BF16 or F16 are summed by it, which agrees to rounding.
void linear(const LinearArgs& args, int ith, int nth);

}  // namespace modularbase::kernels
