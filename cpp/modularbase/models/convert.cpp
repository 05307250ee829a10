#include "modularbase/models/convert.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

#include "modularbase/core/errors.h"

namespace modularbase {
namespace {

constexpr std::int64_t kRowsPerChunk = 64;

void row_to_float(ggml_type type, const std::byte* row, float* out, std::int64_t n) {
  switch (type) {
    case GGML_TYPE_F32:
      std::memcpy(out, row, static_cast<std::size_t>(n) * sizeof(float));
      return;
    case GGML_TYPE_F16:
      ggml_cpu_fp16_to_fp32(reinterpret_cast<const ggml_fp16_t*>(row), out, n);
      return;
    case GGML_TYPE_BF16:
      ggml_cpu_bf16_to_fp32(reinterpret_cast<const ggml_bf16_t*>(row), out, n);
      return;
    default:
      ggml_get_type_traits(type)->to_float(row, out, n);
  }
}

/// False when a value overflowed.
bool row_from_float(ggml_type type, const float* row, std::byte* out, std::int64_t n) {
  switch (type) {
    case GGML_TYPE_F32:
      std::memcpy(out, row, static_cast<std::size_t>(n) * sizeof(float));
      return true;
    case GGML_TYPE_BF16:
      ggml_cpu_fp32_to_bf16(row, reinterpret_cast<ggml_bf16_t*>(out), n);
      return true;
    default:
      break;
  }
  ggml_cpu_fp32_to_fp16(row, reinterpret_cast<ggml_fp16_t*>(out), n);
  float largest = 0.0f;
  for (std::int64_t i = 0; i < n; ++i) largest = std::max(largest, std::fabs(row[i]));
  return largest < 65520.0f;  // the first value that rounds to F16 infinity
}

}  // namespace

void convert_tensor(const GgufFile& file, const GgufTensor& source, Tensor target,
                    const Backend& backend) {
  const std::int64_t n = source.ne[0];
  const std::int64_t n_rows = source.ne[1];
  const std::byte* from = file.tensor_bytes(source).data();
  if (source.type == target->type) {
    ggml_backend_tensor_set(target, from, 0, source.n_bytes);
    return;
  }
  const std::size_t from_stride = ggml_row_size(source.type, n);
  const std::size_t to_stride = ggml_row_size(target->type, n);
  std::vector<std::byte> staging(backend.is_cpu() ? 0
                                                  : to_stride * static_cast<std::size_t>(n_rows));
  std::byte* to = backend.is_cpu() ? static_cast<std::byte*>(target->data) : staging.data();

  std::atomic<std::int64_t> next{0};
  std::atomic<bool> fits{true};
  const auto work = [&] {
    std::vector<float> row(static_cast<std::size_t>(n));
    for (;;) {
      const std::int64_t first = next.fetch_add(kRowsPerChunk);
      if (first >= n_rows) return;
      for (std::int64_t i = first; i < std::min(first + kRowsPerChunk, n_rows); ++i) {
        const auto at = static_cast<std::size_t>(i);
        row_to_float(source.type, from + at * from_stride, row.data(), n);
        if (!row_from_float(target->type, row.data(), to + at * to_stride, n)) fits = false;
      }
    }
  };
  {
    std::vector<std::jthread> threads;
    const bool worth_threads = n_rows > kRowsPerChunk;
    for (int i = 1; worth_threads && i < backend.n_threads(); ++i) threads.emplace_back(work);
    work();
  }
  if (!fits) {
    throw BaseLoadError(file.path(), "tensor " + source.name, "values within the range of F16",
                        "a value that overflows (use bf16 or f32)");
  }
  if (!backend.is_cpu()) ggml_backend_tensor_set(target, staging.data(), 0, staging.size());
}

}  // namespace modularbase
