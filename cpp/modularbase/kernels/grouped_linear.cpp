#include "modularbase/kernels/grouped_linear.h"

#include <array>
#include <vector>

#include "modularbase/kernels/linear.h"
#include "modularbase/kernels/linear_dequantised.h"
#include "modularbase/kernels/linear_k_quant.h"
#include "modularbase/kernels/linear_product.h"

namespace modularbase::kernels {
namespace {

constexpr std::int64_t kChunksPerThread = 4;  // so that a slow core costs at most a quarter
constexpr std::int64_t kMaxWBlock = 256;

std::int64_t divide_up(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

/// How the groups are cut into chunks: (group) x (block of its rows) x (block of columns). Every
/// thread derives the same plan.
class GroupedPlan {
 public:
  GroupedPlan(const GroupedLinearArgs& args, std::int64_t packed_row_bytes, int nth,
              std::vector<int>& chunk_ends)
      : args_(args), x_limit_(x_block_limit(packed_row_bytes)), chunk_ends_(chunk_ends) {
    const auto n_groups = std::ssize(args.groups);
    const std::int64_t w_wanted = n_groups * args.n_out / (nth * kChunksPerThread);
    w_block_ = std::clamp(w_wanted / kColumnBlock * kColumnBlock, kColumnBlock, kMaxWBlock);
    n_w_chunks_ = static_cast<int>(divide_up(args.n_out, w_block_));
    chunk_ends_.clear();
    int end = 0;
    for (const RowGroup& group : args.groups) {
      end += n_x_blocks(group) * n_w_chunks_;
      chunk_ends_.push_back(end);
    }
  }

  struct Chunk {
    int group = 0;
    std::int64_t x_begin, x_end;  // entries
    std::int64_t w_begin, w_end;
  };
  /// False behind the last. Indices only grow: the search goes on where it was.
  bool find(int index, Chunk& chunk) const {
    while (static_cast<std::size_t>(chunk.group) < chunk_ends_.size() &&
           index >= chunk_ends_[static_cast<std::size_t>(chunk.group)]) {
      ++chunk.group;
    }
    if (static_cast<std::size_t>(chunk.group) == chunk_ends_.size()) return false;
    const RowGroup& group = args_.groups[static_cast<std::size_t>(chunk.group)];
    const int n_blocks = n_x_blocks(group);
    const int at =
        index - (chunk_ends_[static_cast<std::size_t>(chunk.group)] - n_blocks * n_w_chunks_);
    const std::int64_t block = at / n_w_chunks_;
    chunk.x_begin = group.first + block * group.n / n_blocks;
    chunk.x_end = group.first + (block + 1) * group.n / n_blocks;
    chunk.w_begin = at % n_w_chunks_ * w_block_;
    chunk.w_end = std::min(chunk.w_begin + w_block_, args_.n_out);
    return true;
  }

  std::int64_t x_limit() const { return x_limit_; }

 private:
  int n_x_blocks(const RowGroup& group) const {
    return static_cast<int>(divide_up(group.n, x_limit_));
  }

  const GroupedLinearArgs& args_;
  std::int64_t x_limit_;
  std::int64_t w_block_;
  int n_w_chunks_;
  std::vector<int>& chunk_ends_;
};

using Sums = std::array<float, kMaxXBlock * kColumnBlock>;
struct ChunkSums {
  alignas(64) Sums gate;
  alignas(64) Sums up;
};

ChunkSums& chunk_sums() {
  thread_local ChunkSums sums;
  return sums;
}

void add_scaled(const float* sums, float amount, float* y, int n_cols) {
  for (int i = 0; i < n_cols; i += simd::kLanes) {
    const int n = std::min(simd::kLanes, n_cols - i);
    const simd::Vec sum = simd::load(sums + i);
    store_part(y + i, n, simd::fma(simd::set1(amount), sum, load_part(y + i, n)));
  }
}

template <class Product>
void run_chunk(const GroupedLinearArgs& args, const GroupedPlan::Chunk& chunk, Product& product) {
  const RowGroup& group = args.groups[static_cast<std::size_t>(chunk.group)];
  ChunkSums& sums = chunk_sums();
  for (std::int64_t begin = chunk.w_begin; begin < chunk.w_end; begin += kColumnBlock) {
    const std::int64_t end = std::min(begin + kColumnBlock, chunk.w_end);
    product.multiply(group.weight, begin, end, sums.gate.data());
    if (group.up_weight) product.multiply(group.up_weight, begin, end, sums.up.data());
    for (std::int64_t entry = chunk.x_begin; entry < chunk.x_end; ++entry) {
      const std::int64_t in_block = (entry - chunk.x_begin) * kColumnBlock;
      if (args.amounts) {
        add_scaled(sums.gate.data() + in_block, args.amounts[entry],
                   args.y + args.y_rows[entry] * args.n_out + begin, static_cast<int>(end - begin));
        continue;
      }
      finish({.sums = sums.gate.data() + in_block,
              .up_sums = group.up_weight ? sums.up.data() + in_block : nullptr,
              .bias = nullptr,
              .up_bias = nullptr,
              .residual = nullptr,
              .y = args.y + args.y_rows[entry] * args.n_out + begin},
             static_cast<int>(end - begin));
    }
  }
}

void pack_rows(const GroupedLinearArgs& args, const GroupedPlan::Chunk& chunk, auto& product) {
  std::array<const float*, kMaxXBlock> x_rows;
  for (std::int64_t entry = chunk.x_begin; entry < chunk.x_end; ++entry) {
    x_rows[static_cast<std::size_t>(entry - chunk.x_begin)] =
        args.x + args.x_rows[entry] * args.n_in;
  }
  product.pack(x_rows.data(), chunk.x_end - chunk.x_begin);
}

template <class Product>
void run(const GroupedLinearArgs& args, int nth) {
  thread_local std::vector<int> chunk_ends;
  const GroupedPlan plan(args, Product::row_bytes(args.n_in), nth, chunk_ends);
  std::byte* memory = scratch().at_least(Product::scratch_bytes(plan.x_limit(), args.n_in));
  Product product(memory, plan.x_limit(), args.n_in);
  std::int64_t packed_begin = -1;
  GroupedPlan::Chunk chunk{};
  while (plan.find(args.next_chunk->fetch_add(1, std::memory_order_relaxed), chunk)) {
    if (chunk.x_begin != packed_begin) pack_rows(args, chunk, product);
    packed_begin = chunk.x_begin;
    run_chunk(args, chunk, product);
  }
}

#if defined(MODULARBASE_LINEAR_AMX)
bool tiles_pay(const GroupedLinearArgs& args) {
  // One way for all groups of a call: most calls have groups of similar size.
  std::int64_t n_rows = 0;
  for (const RowGroup& group : args.groups) n_rows += group.n;
  return use_tiles(args.type, n_rows / std::ssize(args.groups), args.n_in);
}
#endif

}  // namespace

void grouped_linear(const GroupedLinearArgs& args, int nth) {
  if (args.groups.empty()) return;
#if defined(MODULARBASE_LINEAR_AMX)
  if (tiles_pay(args)) {
    const amx::TileScope tiles;
    return args.type == GGML_TYPE_F16 ? run<TileProduct<true>>(args, nth)
                                      : run<TileProduct<false>>(args, nth);
  }
#endif
  if (linear_supported(args.type)) {
    return with_weight_type(args.type, [&]<class T>() { run<VectorProduct<T>>(args, nth); });
  }
  switch (args.type) {
    case GGML_TYPE_Q4_0:
      return run<VectorProduct<DequantisedWeights<GGML_TYPE_Q4_0>>>(args, nth);
    case GGML_TYPE_Q8_0:
      return run<VectorProduct<DequantisedWeights<GGML_TYPE_Q8_0>>>(args, nth);
    case GGML_TYPE_Q4_K:
#if defined(MODULARBASE_LINEAR_QUANTISED)
      return run<VectorProduct<Q4_KWeights>>(args, nth);
#else
      return run<VectorProduct<DequantisedWeights<GGML_TYPE_Q4_K>>>(args, nth);
#endif
    default:
      GGML_ABORT("grouped_linear: no kernel for weight type %s", ggml_type_name(args.type));
  }
}

}  // namespace modularbase::kernels
