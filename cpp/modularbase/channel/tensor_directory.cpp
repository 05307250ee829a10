#include "modularbase/channel/tensor_directory.h"

#include <algorithm>
#include <cstring>
#include <set>
#include <string_view>
#include <utility>

#include "modularbase/core/errors.h"
#include "modularbase/core/utf8.h"

namespace modularbase::channel {
namespace {

/// What is wrong with a description; empty fields where nothing is.
struct Fault {
  std::string field;
  std::string expected;
  std::string found;
};

Fault find_name_fault(std::string_view name) {
  if (name.empty() || name.size() > kMaxNameBytes) {
    return {"name", "1 to " + std::to_string(kMaxNameBytes) + " bytes",
            std::to_string(name.size())};
  }
  if (!is_valid_utf8(name) || name.find('\0') != std::string_view::npos) {
    return {"name", "UTF-8 without NUL", std::string(name)};
  }
  return {};
}

/// Sets n_bytes where there is no fault.
Fault find_shape_fault(const ChannelTensor& tensor, std::size_t& n_bytes) {
  const BlockSize block = block_size(tensor.type);
  if (block.n_values == 0) {
    return {"type", "F32, F16, BF16, Q8_0, Q4_0 or Q4_K",
            "ggml type " + std::to_string(static_cast<std::uint32_t>(tensor.type))};
  }
  if (tensor.ne.empty() || tensor.ne.size() > kMaxDims) {
    return {"number of dimensions", "1 to 4", std::to_string(tensor.ne.size())};
  }
  std::int64_t n_values = 1;
  constexpr std::int64_t kMaxValues = kMaxSegmentBytes;
  for (const std::int64_t n : tensor.ne) {
    if (n < 1 || n > kMaxValues / n_values) {
      return {"shape", "dimensions from 1, in a segment of 2^46 bytes", std::to_string(n)};
    }
    n_values *= n;
  }
  if (tensor.ne[0] % block.n_values != 0) {
    return {"ne[0]", "a multiple of " + std::to_string(block.n_values),
            std::to_string(tensor.ne[0])};
  }
  n_bytes = static_cast<std::size_t>(n_values / block.n_values * block.n_bytes);
  return {};
}

/// Fills in `tensor`, whose name is known, as far as the entry can be.
Fault decode_entry(const TensorEntry& entry, std::size_t first_offset, std::size_t n_payload_bytes,
                   PlacedTensor& tensor) {
  Fault fault = find_name_fault(tensor.name);
  if (!fault.field.empty()) return fault;
  if (entry.n_dims < 1 || entry.n_dims > kMaxDims) {
    return {"number of dimensions", "1 to 4", std::to_string(entry.n_dims)};
  }
  tensor.type = static_cast<TensorType>(entry.type);
  tensor.ne.assign(entry.ne, entry.ne + entry.n_dims);
  tensor.offset = entry.offset;
  fault = find_shape_fault(tensor, tensor.n_bytes);
  if (!fault.field.empty()) return fault;
  if (entry.n_bytes != tensor.n_bytes) {
    return {"bytes", std::to_string(tensor.n_bytes), std::to_string(entry.n_bytes)};
  }
  if (entry.offset % kAlignment != 0 || entry.offset < first_offset ||
      entry.offset > n_payload_bytes || tensor.n_bytes > n_payload_bytes - entry.offset) {
    return {"offset",
            "a multiple of 64 behind the tensor before, and its bytes within " +
                std::to_string(n_payload_bytes),
            std::to_string(entry.offset)};
  }
  return {};
}

}  // namespace

BlockSize block_size(TensorType type) {
  switch (type) {
    case TensorType::kF32:
      return {1, 4};
    case TensorType::kF16:
    case TensorType::kBF16:
      return {1, 2};
    case TensorType::kQ4_0:
      return {32, 18};
    case TensorType::kQ8_0:
      return {32, 34};
    case TensorType::kQ4_K:
      return {256, 144};
  }
  return {};
}

std::size_t payload_bytes(std::span<const PlacedTensor> tensors) {
  return tensors.empty() ? 0 : aligned(tensors.back().offset + tensors.back().n_bytes);
}

std::vector<PlacedTensor> place_tensors(std::span<const ChannelTensor> tensors) {
  if (tensors.empty() || tensors.size() > kMaxTensors) {
    throw InvalidRequestError("tensors", "1 to " + std::to_string(kMaxTensors),
                              std::to_string(tensors.size()));
  }
  std::vector<PlacedTensor> placed;
  std::set<std::string_view> names;
  for (const ChannelTensor& tensor : tensors) {
    std::size_t n_bytes = 0;
    Fault fault = find_name_fault(tensor.name);
    if (fault.field.empty()) fault = find_shape_fault(tensor, n_bytes);
    if (fault.field.empty() && !names.insert(tensor.name).second) {
      fault = {"name", "each name once", "twice"};
    }
    const std::size_t offset = payload_bytes(placed);
    if (fault.field.empty() && n_bytes > kMaxSegmentBytes - offset) {
      fault = {"size", "at most 2^46 bytes in all", "more"};
    }
    if (!fault.field.empty()) {
      throw InvalidRequestError("tensor " + tensor.name + ": " + fault.field, fault.expected,
                                fault.found);
    }
    placed.push_back({tensor, offset, n_bytes});
  }
  return placed;
}

std::vector<TensorEntry> encode_directory(std::span<const PlacedTensor> tensors) {
  std::vector<TensorEntry> entries(tensors.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const PlacedTensor& tensor = tensors[i];
    TensorEntry& entry = entries[i];
    tensor.name.copy(entry.name, kMaxNameBytes);
    entry.type = static_cast<std::uint32_t>(tensor.type);
    entry.n_dims = static_cast<std::uint32_t>(tensor.ne.size());
    std::fill_n(entry.ne, kMaxDims, 1);
    std::copy(tensor.ne.begin(), tensor.ne.end(), entry.ne);
    entry.offset = tensor.offset;
    entry.n_bytes = tensor.n_bytes;
  }
  return entries;
}

std::vector<PlacedTensor> decode_directory(const std::string& segment,
                                           std::span<const TensorEntry> entries,
                                           std::size_t n_payload_bytes) {
  std::vector<PlacedTensor> tensors;
  std::set<std::string> names;
  for (const TensorEntry& entry : entries) {
    PlacedTensor tensor;
    tensor.name.assign(entry.name, ::strnlen(entry.name, sizeof entry.name));
    Fault fault = decode_entry(entry, payload_bytes(tensors), n_payload_bytes, tensor);
    if (fault.field.empty() && !names.insert(tensor.name).second) {
      fault = {"name", "each name once", "twice"};
    }
    if (!fault.field.empty()) {
      std::string field = "tensor " + std::to_string(tensors.size());
      field.append(" ").append(tensor.name).append(": ").append(fault.field);
      throw ChannelError(segment, field, fault.expected, fault.found);
    }
    tensors.push_back(std::move(tensor));
  }
  return tensors;
}

}  // namespace modularbase::channel
