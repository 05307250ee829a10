#include "modularbase/io/gguf_parser.h"

#include <array>
#include <bit>
#include <cstdint>

#include "modularbase/core/utf8.h"

namespace modularbase {
namespace {

constexpr std::uint32_t kMagic = 0x46554747;           // "GGUF" as stored
constexpr std::size_t kMinEntryBytes = 8 + 1 + 4 + 1;  // key, value type, smallest value
constexpr std::size_t kMinTensorBytes =
    8 + 1 + 4 + 8 + 4 + 8;  // name, n_dims, one dimension, type, offset
constexpr std::size_t kDefaultAlignment = 32;
constexpr std::uint64_t kMaxAlignment = std::uint64_t{1}
                                        << 30;  // keeps aligning up from overflowing

void check_magic(GgufReader& reader) {
  const auto magic = reader.read<std::uint32_t>({"magic"});
  if (magic == kMagic) return;
  const auto bytes = std::bit_cast<std::array<char, 4>>(magic);
  reader.fail({"magic"}, "\"GGUF\"",
              "\"" + printable({bytes.data(), bytes.size()}) + "\" (not a GGUF file)");
}

void check_version(GgufReader& reader) {
  const auto version = reader.read<std::uint32_t>({"version"});
  if (version == 2 || version == 3) return;
  // The version of a big-endian file has its low 16 bits empty when read as little-endian.
  const bool big_endian = version != 0 && (version & 0xFFFF) == 0;
  reader.fail({"version"}, "2 or 3, little-endian",
              big_endian ? "a big-endian file" : std::to_string(version));
}

std::size_t alignment_of(const GgufMetadata& metadata, const GgufReader& reader) {
  constexpr GgufField kField{"general.alignment"};
  const auto it = metadata.find(kField.owner);
  if (it == metadata.end()) return kDefaultAlignment;
  const auto* scalar = std::get_if<GgufScalar>(&it->second);
  const auto* value = scalar != nullptr ? std::get_if<std::uint64_t>(scalar) : nullptr;
  if (value == nullptr) reader.fail(kField, "an unsigned integer", "another type");
  if (!std::has_single_bit(*value) || *value < 8 || *value > kMaxAlignment) {
    reader.fail(kField, "a power of two from 8 to " + std::to_string(kMaxAlignment),
                std::to_string(*value));
  }
  return static_cast<std::size_t>(*value);
}

}  // namespace

GgufContents parse_gguf(std::span<const std::byte> image, const std::string& path) {
  GgufReader reader(image, path);
  check_magic(reader);
  check_version(reader);
  const std::size_t n_tensors = reader.read_count({"tensor count"}, kMinTensorBytes);
  const std::size_t n_entries = reader.read_count({"metadata count"}, kMinEntryBytes);
  GgufContents contents;
  contents.metadata = read_metadata(reader, n_entries);
  contents.tensors = read_tensor_directory(reader, n_tensors,
                                           alignment_of(contents.metadata, reader), image.size());
  return contents;
}

}  // namespace modularbase
