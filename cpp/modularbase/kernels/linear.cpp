#include "modularbase/kernels/linear.h"

#include <array>

#include "modularbase/kernels/linear_product.h"

namespace modularbase::kernels {
namespace {

template <class Product>
void run_chunk(const LinearArgs& args, const LinearPlan& plan, const LinearPlan::Chunk& chunk,
               const Product& product, float* sums) {
  const bool is_swiglu = args.epilogue == Epilogue::kSwiGlu;
  const LinearWeight& weight = args.weights[chunk.weight];
  const LinearWeight& up = args.weights[is_swiglu ? 1 : 0];
  float* up_sums = sums + plan.x_block() * kColumnBlock;
  std::int64_t y_col = 0;
  for (int i = 0; i < chunk.weight; ++i) y_col += args.weights[i].n_out;
  for (std::int64_t begin = chunk.w_begin; begin < chunk.w_end; begin += kColumnBlock) {
    const std::int64_t end = std::min(begin + kColumnBlock, chunk.w_end);
    product.multiply(weight.data, begin, end, sums);
    if (is_swiglu) product.multiply(up.data, begin, end, up_sums);
    for (std::int64_t row = chunk.x_begin; row < chunk.x_end; ++row) {
      const std::int64_t at = row * plan.y_stride() + y_col + begin;
      const std::int64_t in_block = (row - chunk.x_begin) * kColumnBlock;
      finish({.sums = sums + in_block,
              .up_sums = is_swiglu ? up_sums + in_block : nullptr,
              .bias = weight.bias ? weight.bias + begin : nullptr,
              .up_bias = up.bias ? up.bias + begin : nullptr,
              .residual = args.epilogue == Epilogue::kAddResidual ? args.residual + at : nullptr,
              .y = args.y + at},
             static_cast<int>(end - begin));
    }
  }
}

template <class Product>
void run(const LinearArgs& args, int nth) {
  const LinearPlan plan(args, Product::row_bytes(args.n_in), nth);
  const std::int64_t sums_bytes = plan.sums_bytes();
  std::byte* memory =
      scratch().at_least(sums_bytes + Product::scratch_bytes(plan.x_block(), args.n_in));
  Product product(memory + sums_bytes, plan.x_block(), args.n_in);
  std::int64_t packed_begin = -1;
  for (;;) {
    const int index = args.next_chunk->fetch_add(1, std::memory_order_relaxed);
    if (index >= plan.n_chunks()) return;
    const LinearPlan::Chunk chunk = plan.chunk(index);
    if (chunk.x_begin != packed_begin) {
      packed_begin = chunk.x_begin;
      std::array<const float*, kMaxXBlock> x_rows;
      const std::int64_t n_rows = chunk.x_end - chunk.x_begin;
      for (std::int64_t i = 0; i < n_rows; ++i) {
        x_rows[static_cast<std::size_t>(i)] = args.x + (chunk.x_begin + i) * args.n_in;
      }
      product.pack(x_rows.data(), n_rows);
    }
    run_chunk(args, plan, chunk, product, reinterpret_cast<float*>(memory));
  }
}

}  // namespace

bool linear_supported(ggml_type type) {
  switch (type) {
    case GGML_TYPE_F32:
    case GGML_TYPE_F16:
    case GGML_TYPE_BF16:
#if defined(MODULARBASE_LINEAR_QUANTISED)
    case GGML_TYPE_Q4_0:
    case GGML_TYPE_Q4_1:
    case GGML_TYPE_Q8_0:
      return true;
#endif
    default:
      return false;
  }
}

void round_linear_input([[maybe_unused]] ggml_type type, const float* x, std::int64_t n,
                        float* out) {
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
  if (type == GGML_TYPE_BF16) {
    for (std::int64_t i = 0; i < n; ++i) out[i] = ggml_bf16_to_fp32(ggml_fp32_to_bf16(x[i]));
    return;
  }
#endif
#if defined(MODULARBASE_LINEAR_QUANTISED)
  if (ggml_is_quantized(type)) {
    std::int8_t q[kQuantBlock];
    for (std::int64_t first = 0; first < n; first += kQuantBlock) {
      const float scale = round_block(x + first, q);
      for (int i = 0; i < kQuantBlock; ++i) out[first + i] = scale * static_cast<float>(q[i]);
    }
    return;
  }
#endif
  std::copy_n(x, n, out);
}

void linear(const LinearArgs& args, int /*ith*/, int nth) {
  if (args.n_rows == 0) return;
  const ggml_type type = args.weights[0].type;
#if defined(MODULARBASE_LINEAR_AMX)
  if (use_tiles(type, args.n_rows, args.n_in)) {
    const amx::TileScope tiles;
    return type == GGML_TYPE_F16 ? run<TileProduct<true>>(args, nth)
                                 : run<TileProduct<false>>(args, nth);
  }
#endif
  with_weight_type(type, [&]<class T>() { run<VectorProduct<T>>(args, nth); });
}

}  // namespace modularbase::kernels
