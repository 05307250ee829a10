#include "modularbase/io/quantize.h"

#include <ggml.h>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <string>

#include "modularbase/core/errors.h"

namespace modularbase {
namespace {

struct NamedType {
  std::string_view name;
  ggml_type type;
};

constexpr std::array<NamedType, 6> kTypes{{{"f32", GGML_TYPE_F32},
                                           {"f16", GGML_TYPE_F16},
                                           {"bf16", GGML_TYPE_BF16},
                                           {"q8_0", GGML_TYPE_Q8_0},
                                           {"q4_0", GGML_TYPE_Q4_0},
                                           {"q4_k", GGML_TYPE_Q4_K}}};

/// ggml's own, in the part of it that we link, goes number by number.
void widen_f16(const ggml_fp16_t* from, float* to, std::int64_t n) {
  std::int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(eight));
  }
#endif
  ggml_fp16_to_fp32_row(from + i, to + i, n - i);
}

/// Whether a number has all bits of its exponent: NaN and infinity.
template <class Word>
bool has_special(std::span<const std::byte> bytes, Word exponent) {
  const auto* words = reinterpret_cast<const Word*>(bytes.data());
  const std::size_t n = bytes.size() / sizeof(Word);
  Word found = 0;
  for (std::size_t i = 0; i < n; ++i) found |= static_cast<Word>((words[i] & exponent) == exponent);
  return found != 0;
}

/// Whole blocks of a type as floats.
std::vector<float> widen(ggml_type type, std::span<const std::byte> bytes) {
  const auto n_block = static_cast<std::size_t>(ggml_blck_size(type));
  std::vector<float> values(bytes.size() / ggml_type_size(type) * n_block);
  if (values.empty()) return values;
  if (type == GGML_TYPE_F32) {
    std::memcpy(values.data(), bytes.data(), bytes.size());
    return values;
  }
  // ggml reads whole elements: an odd address is no place for them.
  std::vector<std::uint64_t> aligned((bytes.size() + 7) / 8);
  std::memcpy(aligned.data(), bytes.data(), bytes.size());
  const auto n_values = static_cast<std::int64_t>(values.size());
  if (type == GGML_TYPE_F16) {
    widen_f16(reinterpret_cast<const ggml_fp16_t*>(aligned.data()), values.data(), n_values);
  } else {
    ggml_get_type_traits(type)->to_float(aligned.data(), values.data(), n_values);
  }
  return values;
}

}  // namespace

ggml_type weight_type(std::string_view name) {
  for (const NamedType& known : kTypes) {
    if (known.name == name) return known.type;
  }
  throw InvalidRequestError("type", "f32, f16, bf16, q8_0, q4_0 or q4_k", name);
}

std::vector<std::byte> quantize(std::span<const float> values, std::int64_t n_per_row,
                                std::string_view type_name) {
  const ggml_type type = weight_type(type_name);
  const std::int64_t n_block = ggml_blck_size(type);
  if (n_per_row <= 0 || n_per_row % n_block != 0) {
    throw InvalidRequestError("row", "a multiple of " + std::to_string(n_block) + " numbers",
                              std::to_string(n_per_row));
  }
  const auto n_values = static_cast<std::int64_t>(values.size());
  if (n_values % n_per_row != 0) {
    throw InvalidRequestError("values", "rows of " + std::to_string(n_per_row) + " numbers",
                              std::to_string(n_values));
  }
  if (!std::all_of(values.begin(), values.end(), [](float v) { return std::isfinite(v); })) {
    throw InvalidRequestError("values", "finite numbers", "NaN or infinity");
  }
  const std::int64_t n_rows = n_values / n_per_row;
  std::vector<std::byte> bytes(ggml_row_size(type, n_per_row) * static_cast<std::size_t>(n_rows));
  if (bytes.empty()) return bytes;
  ggml_quantize_chunk(type, values.data(), bytes.data(), 0, n_rows, n_per_row, nullptr);
  if (!all_finite(type, bytes)) {
    throw InvalidRequestError("values", "numbers that fit " + std::string(type_name),
                              "one too large");
  }
  return bytes;
}

std::vector<float> dequantize(std::span<const std::byte> bytes, std::string_view type_name) {
  const ggml_type type = weight_type(type_name);
  const std::size_t block_bytes = ggml_type_size(type);
  if (bytes.size() % block_bytes != 0) {
    throw InvalidRequestError("bytes", "a multiple of " + std::to_string(block_bytes),
                              std::to_string(bytes.size()));
  }
  return widen(type, bytes);
}

bool convert_rows(ggml_type from, std::span<const std::byte> rows, ggml_type to,
                  std::span<std::byte> out, std::int64_t n_per_row) {
  if (!all_finite(from, rows)) return false;
  if (from == to) {
    std::copy(rows.begin(), rows.end(), out.begin());
    return true;
  }
  std::vector<float> wide;
  const auto* values = reinterpret_cast<const float*>(rows.data());
  if (from != GGML_TYPE_F32) {
    wide = widen(from, rows);
    values = wide.data();
  }
  const auto n_rows = static_cast<std::int64_t>(rows.size() / ggml_row_size(from, n_per_row));
  ggml_quantize_chunk(to, values, out.data(), 0, n_rows, n_per_row, nullptr);
  return all_finite(to, out);
}

bool all_finite(ggml_type type, std::span<const std::byte> bytes) {
  if (type == GGML_TYPE_F32) return !has_special<std::uint32_t>(bytes, 0x7f800000);
  if (type == GGML_TYPE_F16) return !has_special<std::uint16_t>(bytes, 0x7c00);
  if (type == GGML_TYPE_BF16) return !has_special<std::uint16_t>(bytes, 0x7f80);
  return ggml_validate_row_data(type, bytes.data(), bytes.size());
}

std::vector<float> read_floats(const GgufFile& file, const std::string& name) {
  const GgufTensor* tensor = file.find_tensor(name);
  if (!tensor) throw BaseLoadError(file.path(), "tensor " + name, "present", "missing");
  if (tensor->type != GGML_TYPE_F32 && !ggml_get_type_traits(tensor->type)->to_float) {
    throw BaseLoadError(file.path(), "tensor " + name + " type", "floats, plain or quantised",
                        ggml_type_name(tensor->type));
  }
  return widen(tensor->type, file.tensor_bytes(*tensor));
}

}  // namespace modularbase
