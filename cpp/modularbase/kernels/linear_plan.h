#pragma once

#include <algorithm>
#include <cstdint>

#include "modularbase/kernels/linear.h"

namespace modularbase::kernels {

inline constexpr std::int64_t kColumnBlock =
    32;  // output columns finished together by the epilogue

inline constexpr std::int64_t kPackedBytes =
    384 * 1024;  // of x: leaves room in a 1 MB L2 for the weights that pass
inline constexpr std::int64_t kMaxXBlock = 128;  // keeps the unfinished columns of a block in L1

/// Most rows of x that are packed together.
inline std::int64_t x_block_limit(std::int64_t packed_row_bytes) {
  return std::clamp<std::int64_t>(kPackedBytes / packed_row_bytes, 1, kMaxXBlock);
}

/// How one call is cut into chunks: (block of x rows) x (block of weight rows). Every thread
/// derives the same plan.
class LinearPlan {
 public:
  LinearPlan(const LinearArgs& args, std::int64_t packed_row_bytes, int nth);

  struct Chunk {
    std::int64_t x_begin, x_end;
    int weight;  // index into args.weights; 0 stands for both of kSwiGlu
    std::int64_t w_begin, w_end;
  };
  int n_chunks() const { return n_x_blocks_ * n_w_chunks_; }
  /// Chunks that share a block of x follow each other.
  Chunk chunk(int index) const;

  std::int64_t x_block() const { return x_block_; }
  /// Of the unfinished columns of a block of x, for both weights of kSwiGlu.
  std::int64_t sums_bytes() const {
    return 2 * x_block_ * kColumnBlock * static_cast<std::int64_t>(sizeof(float));
  }
  std::int64_t y_stride() const { return y_stride_; }

 private:
  const LinearArgs& args_;
  int n_outputs_;              // weights that have their own columns of y
  std::int64_t y_stride_ = 0;  // floats from one row of y to the next
  std::int64_t x_block_ = 0;
  std::int64_t w_block_ = 0;
  int n_x_blocks_ = 0;
  int n_w_chunks_ = 0;
};

}  // namespace modularbase::kernels
