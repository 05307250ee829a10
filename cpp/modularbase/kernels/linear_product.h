#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#include "modularbase/kernels/linear_amx.h"
#include "modularbase/kernels/linear_plan.h"
#include "modularbase/kernels/linear_quantised.h"
#include "modularbase/kernels/linear_tile.h"

/// What linear() and grouped_linear() are made of: a block of x rows, packed once, times columns of
/// weights; and what becomes of the sums.
namespace modularbase::kernels {

#if defined(__AVX512F__)
inline constexpr int kTileW = 8, kTileX = 3;  // 24 of 32 registers hold sums
#elif defined(__AVX2__)
inline constexpr int kTileW = 4, kTileX = 3;  // 12 of 16
#else
inline constexpr int kTileW = 4, kTileX = 2;
#endif

inline constexpr int kSums = kTileW * kTileX;
inline constexpr int kFewRows =
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

inline Scratch& scratch() {
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

inline simd::Vec load_part(const float* p, int n) {
  return n == simd::kLanes ? simd::load(p) : simd::load_first(p, n);
}

inline void store_part(float* p, int n, simd::Vec v) {
  n == simd::kLanes ? simd::store(p, v) : simd::store_first(p, n, v);
}

inline void finish(const OutputSpan& span, int n_cols) {
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

  void pack(const float* const* x_rows, std::int64_t n_rows) {
    n_rows_ = n_rows;
    n_panels_ = n_rows <= kFewRows ? 1 : (n_rows + kTileX - 1) / kTileX;
    for (std::int64_t p = 0; p < n_panels_; ++p) {
      for (int j = 0; j < rows(p); ++j) pack_row(x_rows[first_row(p) + j], p, j);
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
void multiply(const void* weight, std::int64_t begin, std::int64_t end, const PackedX<T>& x,
              std::int64_t n_in, float* sums) {
  const auto* weights = static_cast<const typename T::Elem*>(weight);
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

/// A block of rows times weights of type T, on the vector unit.
template <class T>
class VectorProduct {
 public:
  static std::int64_t row_bytes(std::int64_t n_in) {
    return PackedX<T>::row_elems(n_in) * static_cast<std::int64_t>(sizeof(typename T::XElem));
  }
  static std::int64_t scratch_bytes(std::int64_t n_rows, std::int64_t n_in) {
    return n_rows * row_bytes(n_in);
  }

  VectorProduct(std::byte* memory, std::int64_t /*n_rows*/, std::int64_t n_in)
      : x_(reinterpret_cast<typename T::XElem*>(memory), n_in), n_in_(n_in) {}

  void pack(const float* const* x_rows, std::int64_t n_rows) { x_.pack(x_rows, n_rows); }
  /// sums [kColumnBlock, n_rows] of the columns [begin, end).
  void multiply(const void* weight, std::int64_t begin, std::int64_t end, float* sums) const {
    kernels::multiply(weight, begin, end, x_, n_in_, sums);
  }

 private:
  PackedX<T> x_;
  std::int64_t n_in_;
};

#if defined(MODULARBASE_LINEAR_AMX)
/// The same on the tile unit: BF16, and F16 as two BF16 parts.
template <bool kIsF16>
class TileProduct {
 public:
  static std::int64_t row_bytes(std::int64_t n_in) { return n_in * (kIsF16 ? 4 : 2); }
  static std::int64_t scratch_bytes(std::int64_t n_rows, std::int64_t n_in) {
    return 4 * (amx::packed_elems(n_rows, n_in) + kColumnBlock * n_in);
  }

  TileProduct(std::byte* memory, std::int64_t n_rows, std::int64_t n_in) : n_in_(n_in) {
    auto* at = reinterpret_cast<std::uint16_t*>(memory);
    const auto parts_of = [&](std::int64_t n) {
      const amx::Parts<std::uint16_t> parts{at, kIsF16 ? at + n : nullptr};
      at += 2 * n;
      return parts;
    };
    packed_ = parts_of(amx::packed_elems(n_rows, n_in));
    rows_ = parts_of(kColumnBlock * n_in);
  }

  void pack(const float* const* x_rows, std::int64_t n_rows) {
    n_rows_ = n_rows;
    amx::pack_x(x_rows, n_rows, n_in_, packed_);
  }

  void multiply(const void* weight, std::int64_t begin, std::int64_t end, float* sums) const {
    const auto* w = static_cast<const std::uint16_t*>(weight) + begin * n_in_;
    const std::int64_t n = (end - begin) * n_in_;
    const std::int64_t n_all = kColumnBlock * n_in_;  // tiles always read kColumnBlock rows
    if (kIsF16) {
      amx::split_f16(w, n, rows_);
      std::fill(rows_.low + n, rows_.low + n_all, std::uint16_t{0});
    } else if (n < n_all) {
      std::copy_n(w, n, rows_.high);
    }
    if (n < n_all) std::fill(rows_.high + n, rows_.high + n_all, std::uint16_t{0});
    const bool in_rows = kIsF16 || n < n_all;
    amx::multiply({in_rows ? rows_.high : w, rows_.low}, {packed_.high, packed_.low}, n_rows_,
                  n_in_, sums);
  }

 private:
  static_assert(amx::kColumns == kColumnBlock);
  std::int64_t n_in_;
  std::int64_t n_rows_ = 0;
  amx::Parts<std::uint16_t> packed_{};
  amx::Parts<std::uint16_t> rows_{};  // weights in two parts, or the last few
};

/// Few rows stay with the vectors: there the memory decides, and sums keep their order.
inline bool use_tiles(ggml_type type, std::int64_t n_rows, std::int64_t n_in) {
  return (type == GGML_TYPE_BF16 || type == GGML_TYPE_F16) && n_rows > kFewRows &&
         n_in % amx::kTileK == 0 && amx::available();
}
#endif

/// Calls run.template operator()<T>() with the vector traits of a weight type.
template <class Run>
void with_weight_type(ggml_type type, const Run& run) {
  switch (type) {
    case GGML_TYPE_F32:
      return run.template operator()<F32Weights>();
    case GGML_TYPE_F16:
      return run.template operator()<F16Weights>();
    case GGML_TYPE_BF16:
      return run.template operator()<Bf16Weights>();
#if defined(MODULARBASE_LINEAR_QUANTISED)
    case GGML_TYPE_Q4_0:
      return run.template operator()<Q4_0Weights>();
    case GGML_TYPE_Q4_1:
      return run.template operator()<Q4_1Weights>();
    case GGML_TYPE_Q8_0:
      return run.template operator()<Q8_0Weights>();
#endif
    default:
      GGML_ABORT("linear: no kernel for weight type %s", ggml_type_name(type));
  }
}

}  // namespace modularbase::kernels
