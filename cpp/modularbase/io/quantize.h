#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "modularbase/io/gguf_file.h"

namespace modularbase {

/// f32, f16, bf16, q8_0, q4_0 or q4_k. \throws InvalidRequestError when it is another.
ggml_type weight_type(std::string_view name);

/// Rounds rows of `n_per_row` numbers to a type of the pack format: f32, f16, bf16, q8_0, q4_0 or
/// q4_k. Any thread. \throws InvalidRequestError when the type is another, a row is no whole
/// number of its blocks, or a number is not finite or too large for the type.
std::vector<std::byte> quantize(std::span<const float> values, std::int64_t n_per_row,
                                std::string_view type_name);

/// The numbers that such bytes stand for. \throws InvalidRequestError as above, and when the bytes
/// are no whole number of blocks.
std::vector<float> dequantize(std::span<const std::byte> bytes, std::string_view type_name);

/// Rows of plain numbers (F32, F16 or BF16) in a type of the pack format; the same type is a copy.
/// Both in whole elements at their alignment. Any thread. False when a number is not finite, or too
/// large for the type.
bool convert_rows(ggml_type from, std::span<const std::byte> rows, ggml_type to,
                  std::span<std::byte> out, std::int64_t n_per_row);

/// Whether there is no NaN or infinity among numbers, at their alignment, or factors of blocks.
bool all_finite(ggml_type type, std::span<const std::byte> bytes);

/// A tensor's numbers, whatever type that floats can be made of. \throws BaseLoadError.
std::vector<float> read_floats(const GgufFile& file, const std::string& tensor);

}  // namespace modularbase
