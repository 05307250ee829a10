#include <ggml.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "modularbase/core/utf8.h"
#include "modularbase/io/gguf_parser.h"

namespace modularbase {
namespace {

std::string read_name(GgufReader& reader, std::uint64_t index) {
  const GgufField field{"tensor", "name", index};
  const std::string_view name = reader.read_string(field);
  if (name.empty() || name.size() >= GGML_MAX_NAME) {
    reader.fail(field, "a name of 1 to " + std::to_string(GGML_MAX_NAME - 1) + " bytes",
                std::to_string(name.size()) + " bytes");
  }
  if (!is_valid_utf8(name) || name.find('\0') != std::string_view::npos) {
    reader.fail(field, "valid UTF-8 without NUL", printable(name));
  }
  return std::string(name);
}

/// Every dimension is at least 1, and so is the number of elements, which fits 63 bits.
std::array<std::int64_t, 4> read_shape(GgufReader& reader, std::string_view owner) {
  const auto n_dims = reader.read<std::uint32_t>({owner, "n_dims"});
  if (n_dims < 1 || n_dims > GGML_MAX_DIMS) {
    reader.fail({owner, "n_dims"}, "1 to " + std::to_string(GGML_MAX_DIMS), std::to_string(n_dims));
  }
  std::array<std::int64_t, 4> ne{1, 1, 1, 1};
  std::int64_t n_elements = 1;
  for (std::size_t i = 0; i < n_dims; ++i) {
    ne[i] = reader.read<std::int64_t>({owner, "dimension", i});
    if (ne[i] < 1) {
      reader.fail({owner, "dimension", i}, "at least 1", std::to_string(ne[i]));
    }
    if (__builtin_mul_overflow(n_elements, ne[i], &n_elements)) {
      reader.fail({owner, "dimension", i}, "a number of elements below 2^63",
                  std::to_string(ne[i]) + " (the product overflows)");
    }
  }
  return ne;
}

ggml_type read_type(GgufReader& reader, std::string_view owner) {
  const auto number = reader.read<std::uint32_t>({owner, "type"});
  if (number >= GGML_TYPE_COUNT) {
    reader.fail({owner, "type"}, "a ggml type below " + std::to_string(GGML_TYPE_COUNT),
                std::to_string(number));
  }
  const auto type = static_cast<ggml_type>(number);
  if (ggml_type_size(type) == 0 || ggml_blck_size(type) == 0) {
    const char* name = ggml_type_name(type);
    reader.fail({owner, "type"}, "a ggml type in use",
                std::to_string(number) + " (" + (name != nullptr ? name : "never used") + ")");
  }
  return type;
}

std::size_t size_in_bytes(const GgufReader& reader, std::string_view owner, ggml_type type,
                          const std::array<std::int64_t, 4>& ne) {
  const std::int64_t block = ggml_blck_size(type);
  if (ne[0] % block != 0) {
    reader.fail(
        {owner, "dimension", 0},
        "a multiple of " + std::to_string(block) + " (the block of " + ggml_type_name(type) + ")",
        std::to_string(ne[0]));
  }
  const auto n_blocks = static_cast<std::size_t>(ne[0] / block * ne[1] * ne[2] * ne[3]);
  std::size_t n_bytes = 0;
  if (__builtin_mul_overflow(n_blocks, ggml_type_size(type), &n_bytes)) {
    reader.fail({owner, "size"}, "a number of bytes below 2^64", "an overflow");
  }
  return n_bytes;
}

/// Makes offsets absolute, and checks them, once it is known where the directory ends.
void place(const GgufReader& reader, std::vector<GgufTensor>& tensors, std::size_t alignment,
           std::size_t image_bytes) {
  const std::size_t data_begin = (reader.position() + alignment - 1) / alignment * alignment;
  for (GgufTensor& tensor : tensors) {
    const std::string owner = "tensor " + tensor.name;
    if (tensor.offset % alignment != 0) {
      reader.fail({owner, "offset"}, "a multiple of " + std::to_string(alignment),
                  std::to_string(tensor.offset));
    }
    const std::size_t room = image_bytes > data_begin ? image_bytes - data_begin : 0;
    if (tensor.n_bytes > room || tensor.offset > room - tensor.n_bytes) {
      reader.fail({owner, "offset"},
                  std::to_string(tensor.n_bytes) + " bytes inside the " + std::to_string(room) +
                      " bytes of tensor data",
                  std::to_string(tensor.offset) + " (the tensor ends past the end of the file)");
    }
    tensor.offset += data_begin;
  }
}

void check_disjoint(const GgufReader& reader, const std::vector<GgufTensor>& tensors) {
  std::vector<const GgufTensor*> by_offset;
  by_offset.reserve(tensors.size());
  for (const GgufTensor& tensor : tensors) by_offset.push_back(&tensor);
  std::sort(by_offset.begin(), by_offset.end(),
            [](const auto* a, const auto* b) { return a->offset < b->offset; });
  for (std::size_t i = 1; i < by_offset.size(); ++i) {
    const GgufTensor& before = *by_offset[i - 1];
    const GgufTensor& tensor = *by_offset[i];
    if (tensor.offset < before.offset + before.n_bytes) {
      reader.fail({"tensor " + tensor.name, "offset"}, "no overlap with other tensors",
                  "an overlap with " + before.name);
    }
  }
}

}  // namespace

std::vector<GgufTensor> read_tensor_directory(GgufReader& reader, std::size_t n_tensors,
                                              std::size_t alignment, std::size_t image_bytes) {
  std::vector<GgufTensor> tensors;
  tensors.reserve(n_tensors);  // keeps the views in `names` valid
  std::unordered_set<std::string_view> names;
  for (std::size_t i = 0; i < n_tensors; ++i) {
    GgufTensor& tensor = tensors.emplace_back();
    tensor.name = read_name(reader, i);
    const std::string owner = "tensor " + tensor.name;
    if (!names.insert(tensor.name).second) {
      reader.fail({owner}, "one entry", "a second one (tensor " + std::to_string(i) + ")");
    }
    tensor.ne = read_shape(reader, owner);
    tensor.type = read_type(reader, owner);
    tensor.n_bytes = size_in_bytes(reader, owner, tensor.type, tensor.ne);
    tensor.offset = reader.read<std::uint64_t>({owner, "offset"});
  }
  place(reader, tensors, alignment, image_bytes);
  check_disjoint(reader, tensors);
  return tensors;
}

}  // namespace modularbase
