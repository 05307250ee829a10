#include "modularbase/kernels/linear.h"

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

#include "modularbase/kernels/linear_amx.h"
#include "modularbase/kernels/linear_plan.h"
#include "modularbase/kernels/linear_quantised.h"
#include "modularbase/kernels/linear_tile.h"

namespace modularbase::kernels {
namespace {

#if defined(__AVX512F__)
constexpr int kTileW = 8, kTileX = 3;  // 24 of 32 registers hold sums
#elif defined(__AVX2__)
constexpr int kTileW = 4, kTileX = 3;  // 12 of 16
#else
constexpr int kTileW = 4, kTileX = 2;
#endif

constexpr int kSums = kTileW * kTileX;
constexpr int kFewRows =
    kSums / 3;  // so many rows of x are one panel: weights are read once, from memory

/// Memory of one thread that only grows: nothing is allocated once the largest step has been seen.
class Scratch {
 public:
  std::byte* at_least(std::int64_t n_bytes) {
    if (n_bytes > n_bytes_) {
      memory_.reset(new (kAlign) std::byte[static_cast<std::size_t>(n_bytes)]);
      n_bytes_ = n_bytes;
    }
    return memory_.get();
  }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Free {
    void operator()(std::byte* p) const { ::operator delete[](p, kAlign); }
  };
  std::unique_ptr<std::byte[], Free> memory_;
  std::int64_t n_bytes_ = 0;
};

Scratch& scratch() {
  thread_local Scratch memory;
  return memory;
}

/// The part of the output that one run of tiles has finished: columns [col, col + n_cols) of one
/// row.
struct OutputSpan {
  const float* sums;     // W x
  const float* up_sums;  // of the second weight (kSwiGlu)
  const float* bias;     // or null
  const float* up_bias;
  const float* residual;
  float* y;
};

simd::Vec load_part(const float* p, int n) {
  return n == simd::kLanes ? simd::load(p) : simd::load_first(p, n);
}

void store_part(float* p, int n, simd::Vec v) {
  n == simd::kLanes ? simd::store(p, v) : simd::store_first(p, n, v);
}

void finish(const OutputSpan& span, int n_cols) {
  for (int i = 0; i < n_cols; i += simd::kLanes) {
    const int n = std::min(simd::kLanes, n_cols - i);
    simd::Vec v = simd::load(span.sums + i);
    if (span.bias) v = v + load_part(span.bias + i, n);
    if (span.up_sums) {
      simd::Vec up = simd::load(span.up_sums + i);
      if (span.up_bias) up = up + load_part(span.up_bias + i, n);
      v = simd::silu(v) * up;
    }
    if (span.residual) v = v + load_part(span.residual + i, n);
    store_part(span.y + i, n, v);
  }
}

/// A block of x rows as the tiles read it: panels of up to kTileX rows, interleaved step by step,
/// zero beyond n_in.
template <class T>
class PackedX {
 public:
  static std::int64_t row_elems(std::int64_t n_in) {
    return (n_in + T::kStep - 1) / T::kStep * T::kXStepElems;
  }

  PackedX(typename T::XElem* memory, std::int64_t n_in) : memory_(memory), n_in_(n_in) {}

  void pack(const float* x, std::int64_t begin, std::int64_t end) {
    if (begin == begin_) return;
    begin_ = begin;
    n_rows_ = end - begin;
    n_panels_ = n_rows_ <= kFewRows ? 1 : (n_rows_ + kTileX - 1) / kTileX;
    for (std::int64_t p = 0; p < n_panels_; ++p) {
      for (int j = 0; j < rows(p); ++j) pack_row(x + (begin + first_row(p) + j) * n_in_, p, j);
    }
  }

  std::int64_t n_panels() const { return n_panels_; }
  /// Panels differ by one row at most, so that no tile is left with a single row.
  std::int64_t first_row(std::int64_t p) const { return p * n_rows_ / n_panels_; }
  int rows(std::int64_t p) const { return static_cast<int>(first_row(p + 1) - first_row(p)); }
  typename T::XElem* panel(std::int64_t p) const {
    return memory_ + first_row(p) * row_elems(n_in_);
  }

 private:
  void pack_row(const float* src, std::int64_t p, int j) {
    typename T::XElem* dst = panel(p) + j * T::kXStepElems;
    std::int64_t k = 0;
    for (; k + T::kStep <= n_in_; k += T::kStep, dst += rows(p) * T::kXStepElems) {
      T::pack_x(src + k, dst);
    }
    if (k < n_in_) T::pack_x(src + k, static_cast<int>(n_in_ - k), dst);
  }

  typename T::XElem* memory_;
  std::int64_t n_in_;
  std::int64_t begin_ = -1;
  std::int64_t n_rows_ = 0;
  std::int64_t n_panels_ = 0;
};

/// sums [kColumnBlock, kXRows] = columns [begin, end) of W x for one panel, each weight read once.
template <class T, int kWRows, int kXRows, bool kPrefetch>
void multiply_panel(const typename T::Elem* w, std::int64_t n_cols, const typename T::XElem* x,
                    std::int64_t n_in, float* sums) {
  for (std::int64_t col = 0; col < n_cols; col += kWRows) {
    const int n_w = static_cast<int>(std::min<std::int64_t>(kWRows, n_cols - col));
    dot_tile<T, kWRows, kXRows, kPrefetch>(w + col * T::row_elems(n_in), n_w, x, n_in, sums + col,
                                           kColumnBlock);
  }
}

/// The whole product of a few rows of x: shapes whose sums fill the registers.
template <class T>
void multiply_few(const typename T::Elem* w, std::int64_t n_cols, const PackedX<T>& x,
                  std::int64_t n_in, float* sums) {
  const auto* panel = x.panel(0);
  switch (x.rows(0)) {
    case 1:
      return dot_rows<T>(w, static_cast<int>(n_cols), panel, n_in, sums);
    case 2:
      return multiply_panel<T, kTileW, 2, true>(w, n_cols, panel, n_in, sums);
    case 3:
      return multiply_panel<T, kTileW, 3, true>(w, n_cols, panel, n_in, sums);
    case 4:
      return multiply_panel<T, kSums / 4, 4, true>(w, n_cols, panel, n_in, sums);
    case 5:
      return multiply_panel<T, kSums / 5, 5, true>(w, n_cols, panel, n_in, sums);
    case 6:
      return multiply_panel<T, kSums / 6, 6, true>(w, n_cols, panel, n_in, sums);
    case 7:
      return multiply_panel<T, kSums / 7, 7, true>(w, n_cols, panel, n_in, sums);
    default:
      if constexpr (kFewRows == 8)
        multiply_panel<T, kSums / 8, 8, true>(w, n_cols, panel, n_in, sums);
  }
}

/// sums [kColumnBlock, rows of x] = columns [begin, end) of W x.
template <class T>
void multiply(const LinearWeight& weight, std::int64_t begin, std::int64_t end, const PackedX<T>& x,
              std::int64_t n_in, float* sums) {
  const auto* weights = static_cast<const typename T::Elem*>(weight.data);
  const std::int64_t row_elems = T::row_elems(n_in);
  if (x.n_panels() == 1) {
    return multiply_few<T>(weights + begin * row_elems, end - begin, x, n_in, sums);
  }
  for (std::int64_t col = begin; col < end; col += kTileW) {
    const auto* w = weights + col * row_elems;
    const std::int64_t n_w = std::min<std::int64_t>(kTileW, end - col);
    for (std::int64_t p = 0; p < x.n_panels(); ++p) {
      float* out = sums + x.first_row(p) * kColumnBlock + (col - begin);
      const bool is_first = p == 0;  // the later panels find the weights in the cache
      if (x.rows(p) == kTileX) {
        is_first ? multiply_panel<T, kTileW, kTileX, true>(w, n_w, x.panel(p), n_in, out)
                 : multiply_panel<T, kTileW, kTileX, false>(w, n_w, x.panel(p), n_in, out);
      } else {
        is_first ? multiply_panel<T, kTileW, kTileX - 1, true>(w, n_w, x.panel(p), n_in, out)
                 : multiply_panel<T, kTileW, kTileX - 1, false>(w, n_w, x.panel(p), n_in, out);
      }
    }
  }
}

/// product(weight, begin, end, sums) computes sums [kColumnBlock, rows of x].
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
    product(weight, begin, end, sums);
    if (is_swiglu) product(up, begin, end, up_sums);
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

template <class T>
void run(const LinearArgs& args, int nth) {
  using XElem = typename T::XElem;
  const std::int64_t row_bytes =
      PackedX<T>::row_elems(args.n_in) * static_cast<std::int64_t>(sizeof(XElem));
  const LinearPlan plan(args, row_bytes, nth);
  const std::int64_t sums_bytes = plan.sums_bytes();
  std::byte* memory = scratch().at_least(sums_bytes + plan.x_block() * row_bytes);
  PackedX<T> x(reinterpret_cast<XElem*>(memory + sums_bytes), args.n_in);
  const auto product = [&](const LinearWeight& weight, std::int64_t begin, std::int64_t end,
                           float* sums) { multiply(weight, begin, end, x, args.n_in, sums); };
  for (;;) {
    const int index = args.next_chunk->fetch_add(1, std::memory_order_relaxed);
    if (index >= plan.n_chunks()) return;
    const LinearPlan::Chunk chunk = plan.chunk(index);
    x.pack(args.x, chunk.x_begin, chunk.x_end);
    run_chunk(args, plan, chunk, product, reinterpret_cast<float*>(memory));
  }
}

#if defined(MODULARBASE_LINEAR_AMX)
/// Few rows stay with the vectors: there the memory decides, and sums keep their order.
bool use_amx(const LinearArgs& args) {
  const ggml_type type = args.weights[0].type;
  return (type == GGML_TYPE_BF16 || type == GGML_TYPE_F16) && args.n_rows > kFewRows &&
         args.n_in % amx::kTileK == 0 && amx::available();
}

void run_amx(const LinearArgs& args, int nth) {
  static_assert(amx::kColumns == kColumnBlock);
  const bool is_split = args.weights[0].type == GGML_TYPE_F16;
  const LinearPlan plan(args, args.n_in * (is_split ? 4 : 2), nth);
  const std::int64_t n_packed = amx::packed_elems(plan.x_block(), args.n_in);
  const std::int64_t n_rows_elems = kColumnBlock * args.n_in;
  std::byte* memory = scratch().at_least(plan.sums_bytes() + 4 * (n_packed + n_rows_elems));
  auto* at = reinterpret_cast<std::uint16_t*>(memory + plan.sums_bytes());
  const auto parts_of = [&](std::int64_t n) {
    const amx::Parts<std::uint16_t> parts{at, is_split ? at + n : nullptr};
    at += 2 * n;
    return parts;
  };
  const auto packed = parts_of(n_packed);
  const auto rows = parts_of(n_rows_elems);  // weights in two parts, or the last few
  std::int64_t packed_begin = -1;
  std::int64_t n_rows = 0;
  const auto product = [&](const LinearWeight& weight, std::int64_t begin, std::int64_t end,
                           float* sums) {
    const auto* w = static_cast<const std::uint16_t*>(weight.data) + begin * args.n_in;
    const std::int64_t n = (end - begin) * args.n_in;
    if (is_split) {
      amx::split_f16(w, n, rows);
      std::fill(rows.low + n, rows.low + n_rows_elems, std::uint16_t{0});
    } else if (n < n_rows_elems) {
      std::copy_n(w, n, rows.high);
    }
    if (n < n_rows_elems) std::fill(rows.high + n, rows.high + n_rows_elems, std::uint16_t{0});
    const bool in_rows = is_split || n < n_rows_elems;  // tiles always read kColumnBlock rows
    amx::multiply({in_rows ? rows.high : w, rows.low}, {packed.high, packed.low}, n_rows, args.n_in,
                  sums);
  };
  const amx::TileScope tiles;
  for (;;) {
    const int index = args.next_chunk->fetch_add(1, std::memory_order_relaxed);
    if (index >= plan.n_chunks()) return;
    const LinearPlan::Chunk chunk = plan.chunk(index);
    if (chunk.x_begin != packed_begin) {
      packed_begin = chunk.x_begin;
      n_rows = chunk.x_end - chunk.x_begin;
      amx::pack_x(args.x + chunk.x_begin * args.n_in, n_rows, args.n_in, packed);
    }
    run_chunk(args, plan, chunk, product, reinterpret_cast<float*>(memory));
  }
}
#endif

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
  if (use_amx(args)) return run_amx(args, nth);
#endif
  switch (type) {
    case GGML_TYPE_F32:
      return run<F32Weights>(args, nth);
    case GGML_TYPE_F16:
      return run<F16Weights>(args, nth);
    case GGML_TYPE_BF16:
      return run<Bf16Weights>(args, nth);
#if defined(MODULARBASE_LINEAR_QUANTISED)
    case GGML_TYPE_Q4_0:
      return run<Q4_0Weights>(args, nth);
    case GGML_TYPE_Q4_1:
      return run<Q4_1Weights>(args, nth);
    case GGML_TYPE_Q8_0:
      return run<Q8_0Weights>(args, nth);
#endif
    default:
      GGML_ABORT("linear: no kernel for weight type %s", ggml_type_name(type));
  }
}

}  // namespace modularbase::kernels
