#include "modularbase/kernels/linear_plan.h"

namespace modularbase::kernels {
namespace {

constexpr std::int64_t kMaxWBlock = 256;
constexpr std::int64_t kChunksPerThread = 8;  // so that a slow core costs at most an eighth

std::int64_t divide_up(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace

LinearPlan::LinearPlan(const LinearArgs& args, std::int64_t packed_row_bytes, int nth)
    : args_(args) {
  n_outputs_ = args.epilogue == Epilogue::kSwiGlu ? 1 : args.n_weights;
  for (int i = 0; i < n_outputs_; ++i) y_stride_ += args.weights[i].n_out;

  const std::int64_t x_limit = x_block_limit(packed_row_bytes);
  n_x_blocks_ = static_cast<int>(divide_up(args.n_rows, x_limit));
  x_block_ = divide_up(args.n_rows, n_x_blocks_);

  const std::int64_t w_wanted = nth == 1 ? y_stride_ : y_stride_ / (nth * kChunksPerThread);
  w_block_ = nth == 1
                 ? divide_up(w_wanted, kColumnBlock) * kColumnBlock
                 : std::clamp(w_wanted / kColumnBlock * kColumnBlock, kColumnBlock, kMaxWBlock);
  for (int i = 0; i < n_outputs_; ++i) {
    n_w_chunks_ += static_cast<int>(divide_up(args.weights[i].n_out, w_block_));
  }
}

LinearPlan::Chunk LinearPlan::chunk(int index) const {
  Chunk chunk{};
  chunk.x_begin = index / n_w_chunks_ * x_block_;
  chunk.x_end = std::min(chunk.x_begin + x_block_, args_.n_rows);
  std::int64_t block = index % n_w_chunks_;
  while (block * w_block_ >= args_.weights[chunk.weight].n_out) {
    block -= divide_up(args_.weights[chunk.weight].n_out, w_block_);
    ++chunk.weight;
  }
  chunk.w_begin = block * w_block_;
  chunk.w_end = std::min(chunk.w_begin + w_block_, args_.weights[chunk.weight].n_out);
  return chunk;
}

}  // namespace modularbase::kernels
