#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "modularbase/channel/channel_layout.h"

namespace modularbase::channel {

/// Types of the pack format, by ggml's numbers.
enum class TensorType : std::uint32_t {
  kF32 = 0,
  kF16 = 1,
  kQ4_0 = 2,
  kQ8_0 = 8,
  kQ4_K = 12,
  kBF16 = 30
};

struct BlockSize {
  std::int64_t n_values = 0;  // 0 for a type that segments do not hold
  std::int64_t n_bytes = 0;
};
BlockSize block_size(TensorType type);

struct ChannelTensor {
  std::string name;
  TensorType type = TensorType::kF32;
  std::vector<std::int64_t> ne;  // 1 to 4, contiguous dimension first
};

/// A tensor and where it lies in a payload buffer.
struct PlacedTensor : ChannelTensor {
  std::size_t offset = 0;
  std::size_t n_bytes = 0;
};

/// Bytes that these tensors take, one after another at multiples of kAlignment.
std::size_t payload_bytes(std::span<const PlacedTensor> tensors);

/// \throws InvalidRequestError for a name, type or shape that cannot be, or a name twice.
std::vector<PlacedTensor> place_tensors(std::span<const ChannelTensor> tensors);

std::vector<TensorEntry> encode_directory(std::span<const PlacedTensor> tensors);

/// Checks entries that another process wrote.
/// \throws ChannelError naming the segment, the tensor, what was expected and what was found.
std::vector<PlacedTensor> decode_directory(const std::string& segment,
                                           std::span<const TensorEntry> entries,
                                           std::size_t n_payload_bytes);

}  // namespace modularbase::channel
