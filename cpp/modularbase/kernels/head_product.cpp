#include "modularbase/kernels/head_product.h"

#include <ggml-cpu.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "modularbase/kernels/linear.h"

namespace modularbase::kernels {
namespace {

constexpr std::size_t kGatherBytes = std::size_t{32} << 10;
constexpr std::size_t kMaxGatherRows = 32;

constexpr std::size_t kRowsAhead =
    4;  // rows lie far apart: without prefetching each would wait for memory

// Layouts of ggml's two activation formats that it cannot turn back to floats itself.
constexpr std::int64_t kQ8KBlock = 256;  // float d; int8 q[256]; int16 sums[16]
constexpr std::size_t kQ8KBytes = 4 + 256 + 32;
constexpr std::int64_t kQ81Block = 32;  // half d; half sum; int8 q[32]
constexpr std::size_t kQ81Bytes = 2 + 2 + 32;

ggml_type packed_type(const HeadWeight& head) {
  return ggml_get_type_traits_cpu(head.type)->vec_dot_type;
}

void unpack_q8_k(const std::byte* packed, std::int64_t n, float* out) {
  for (; n > 0; n -= kQ8KBlock, packed += kQ8KBytes) {
    float d;
    std::memcpy(&d, packed, sizeof(d));
    const auto* q = reinterpret_cast<const std::int8_t*>(packed + sizeof(d));
    for (std::int64_t i = 0; i < kQ8KBlock; ++i) *out++ = d * q[i];
  }
}

void unpack_q8_1(const std::byte* packed, std::int64_t n, float* out) {
  for (; n > 0; n -= kQ81Block, packed += kQ81Bytes) {
    ggml_fp16_t d;
    std::memcpy(&d, packed, sizeof(d));
    const auto* q = reinterpret_cast<const std::int8_t*>(packed + 2 * sizeof(d));
    for (std::int64_t i = 0; i < kQ81Block; ++i) *out++ = ggml_fp16_to_fp32(d) * q[i];
  }
}

void unpack(ggml_type type, const std::byte* packed, std::int64_t n, float* out) {
  switch (type) {
    case GGML_TYPE_F32:
      std::memcpy(out, packed, static_cast<std::size_t>(n) * sizeof(float));
      break;
    case GGML_TYPE_Q8_K:
      unpack_q8_k(packed, n, out);
      break;
    case GGML_TYPE_Q8_1:
      unpack_q8_1(packed, n, out);
      break;
    default:
      ggml_get_type_traits(type)->to_float(packed, out, n);
  }
}

bool can_unpack(ggml_type type) {
  return type == GGML_TYPE_F32 || type == GGML_TYPE_Q8_K || type == GGML_TYPE_Q8_1 ||
         ggml_get_type_traits(type)->to_float;
}

void prefetch_row(const char* row, std::size_t n_bytes) {
  constexpr std::size_t kCacheLine = 64;
  for (std::size_t at = 0; at < n_bytes; at += kCacheLine) __builtin_prefetch(row + at);
}

void linear_rows(const HeadWeight& head, const float* x, const void* rows, std::int64_t n_rows,
                 float* logits) {
  const LinearWeight weight{head.type, rows, n_rows};
  std::atomic<int> next_chunk{0};
  linear({.weights = &weight,
          .n_weights = 1,
          .n_in = head.n_embd,
          .n_rows = 1,
          .x = x,
          .residual = nullptr,
          .y = logits,
          .epilogue = Epilogue::kNone,
          .next_chunk = &next_chunk},
         0, 1);
}

}  // namespace

bool head_product_supported(ggml_type type) {
  if (linear_supported(type)) return true;
  const ggml_type_traits_cpu* cpu = ggml_get_type_traits_cpu(type);
  if (!cpu->vec_dot || !ggml_get_type_traits(type)->to_float) return false;
  const bool can_pack =
      cpu->vec_dot_type == GGML_TYPE_F32 || ggml_get_type_traits_cpu(cpu->vec_dot_type)->from_float;
  return can_pack && can_unpack(cpu->vec_dot_type);
}

void prepare_product_input(const HeadWeight& head, const float* x, ProductInput& input) {
  input.x = x;
  input.multiplied.resize(static_cast<std::size_t>(head.n_embd));
  if (linear_supported(head.type))
    return round_linear_input(head.type, x, head.n_embd, input.multiplied.data());
  const ggml_type type = packed_type(head);
  input.packed.resize(ggml_row_size(type, head.n_embd));
  if (type == GGML_TYPE_F32) {
    std::memcpy(input.packed.data(), x, input.packed.size());
  } else {
    ggml_get_type_traits_cpu(type)->from_float(x, input.packed.data(), head.n_embd);
  }
  unpack(type, input.packed.data(), head.n_embd, input.multiplied.data());
}

double product_error(const HeadWeight& head) {
  const double order = static_cast<double>(head.n_embd) * 0x1p-24;
  const bool is_ours = linear_supported(head.type);
  if (is_ours && !ggml_is_quantized(head.type)) return 2.0 * order;
  // Formats with an offset a block subtract two sums; Q8_1 also rounds a block's sum to F16.
  const double block_sum =
      !is_ours && packed_type(head) == GGML_TYPE_Q8_1 ? std::sqrt(32.0) * 0x1p-11 : 0.0;
  return 4.0 * order + block_sum;
}

void product_logits(const HeadWeight& head, const ProductInput& input, std::span<const TokenId> ids,
                    float* logits) {
  const std::size_t row_bytes = ggml_row_size(head.type, head.n_embd);
  const auto row = [&](std::size_t i) {
    return static_cast<const char*>(head.data) + row_bytes * ids[i];
  };
  const auto prefetch = [&](std::size_t i) {
    if (i < ids.size()) prefetch_row(row(i), row_bytes);
  };
  for (std::size_t i = 0; i < kRowsAhead; ++i) prefetch(i);
  if (!linear_supported(head.type)) {
    const ggml_vec_dot_t vec_dot = ggml_get_type_traits_cpu(head.type)->vec_dot;
    for (std::size_t i = 0; i < ids.size(); ++i) {
      prefetch(i + kRowsAhead);
      vec_dot(static_cast<int>(head.n_embd), logits + i, 0, row(i), 0, input.packed.data(), 0, 1);
    }
    return;
  }
  // linear() packs x once a call, so rows are gathered for it: the copies stay in the first caches.
  alignas(64) char gathered[kGatherBytes];
  const std::size_t n_gather = std::clamp<std::size_t>(kGatherBytes / row_bytes, 1, kMaxGatherRows);
  for (std::size_t first = 0; first < ids.size(); first += n_gather) {
    const std::size_t n = std::min(n_gather, ids.size() - first);
    for (std::size_t i = 0; n > 1 && i < n; ++i) {
      prefetch(first + i + kRowsAhead);
      std::memcpy(gathered + i * row_bytes, row(first + i), row_bytes);
    }
    linear_rows(head, input.x, n > 1 ? gathered : row(first), static_cast<std::int64_t>(n),
                logits + first);
  }
}

}  // namespace modularbase::kernels
