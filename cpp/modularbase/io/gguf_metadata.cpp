#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "modularbase/core/utf8.h"
#include "modularbase/io/gguf_parser.h"

namespace modularbase {
namespace {

/// As numbered in the file.
enum class ValueType : std::uint32_t {
  kUint8 = 0,
  kInt8 = 1,
  kUint16 = 2,
  kInt16 = 3,
  kUint32 = 4,
  kInt32 = 5,
  kFloat32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
  kUint64 = 10,
  kInt64 = 11,
  kFloat64 = 12,
};

constexpr std::size_t kMaxKeyBytes = 65535;  // the GGUF specification's limit

std::string_view read_key(GgufReader& reader, std::uint64_t index) {
  const GgufField field{"metadata entry", "key", index};
  const std::string_view key = reader.read_string(field);
  if (key.empty() || key.size() > kMaxKeyBytes) {
    reader.fail(field, "a key of 1 to " + std::to_string(kMaxKeyBytes) + " bytes",
                std::to_string(key.size()) + " bytes");
  }
  if (!is_valid_utf8(key)) reader.fail(field, "valid UTF-8", printable(key, 80));
  return key;
}

/// Calls `body` with a value of the C++ type in which the file holds `type`; false for other types.
template <typename Body>
bool with_number_type(ValueType type, Body&& body) {
  switch (type) {
    case ValueType::kUint8:
      return body(std::uint8_t{}), true;
    case ValueType::kInt8:
      return body(std::int8_t{}), true;
    case ValueType::kUint16:
      return body(std::uint16_t{}), true;
    case ValueType::kInt16:
      return body(std::int16_t{}), true;
    case ValueType::kUint32:
      return body(std::uint32_t{}), true;
    case ValueType::kInt32:
      return body(std::int32_t{}), true;
    case ValueType::kUint64:
      return body(std::uint64_t{}), true;
    case ValueType::kInt64:
      return body(std::int64_t{}), true;
    case ValueType::kFloat32:
      return body(float{}), true;
    case ValueType::kFloat64:
      return body(double{}), true;
    default:
      return false;
  }
}

template <typename T>
using Widened =
    std::conditional_t<std::is_floating_point_v<T>, double,
                       std::conditional_t<std::is_signed_v<T>, std::int64_t, std::uint64_t>>;

GgufScalar read_scalar(GgufReader& reader, ValueType type, std::string_view key) {
  const GgufField field{key};
  if (type == ValueType::kString) return std::string(reader.read_string(field));
  if (type == ValueType::kBool) return reader.read_bool(field);
  GgufScalar value;
  const bool known = with_number_type(type, [&](auto stored) {
    using Stored = decltype(stored);
    value = Widened<Stored>{reader.read<Stored>(field)};
  });
  if (!known) {
    reader.fail({key, "type"}, "a GGUF value type (0 to 12)",
                std::to_string(static_cast<std::uint32_t>(type)));
  }
  return value;
}

std::vector<std::string> read_strings(GgufReader& reader, std::string_view key) {
  const std::size_t count = reader.read_count({key, "length"}, sizeof(std::uint64_t));
  std::vector<std::string> values;
  values.reserve(count);
  for (std::size_t i = 0; i < count; ++i) {
    values.emplace_back(reader.read_string({key, "element", i}));
  }
  return values;
}

std::vector<bool> read_bools(GgufReader& reader, std::string_view key) {
  const std::size_t count = reader.read_count({key, "length"}, 1);
  std::vector<bool> values(count);
  for (std::size_t i = 0; i < count; ++i) values[i] = reader.read_bool({key, "element", i});
  return values;
}

template <typename Stored>
std::vector<Widened<Stored>> read_numbers(GgufReader& reader, std::string_view key) {
  const std::size_t count = reader.read_count({key, "length"}, sizeof(Stored));
  std::vector<Widened<Stored>> values(count);
  for (std::size_t i = 0; i < count; ++i) values[i] = reader.read<Stored>({key, "element", i});
  return values;
}

GgufArray read_array(GgufReader& reader, std::string_view key) {
  const GgufField type_field{key, "element type"};
  const auto type = static_cast<ValueType>(reader.read<std::uint32_t>(type_field));
  if (type == ValueType::kString) return read_strings(reader, key);
  if (type == ValueType::kBool) return read_bools(reader, key);
  GgufArray values;
  const bool known = with_number_type(
      type, [&](auto stored) { values = read_numbers<decltype(stored)>(reader, key); });
  if (!known) {
    reader.fail(type_field, "a GGUF scalar type",
                type == ValueType::kArray ? "9 (a nested array)"
                                          : std::to_string(static_cast<std::uint32_t>(type)));
  }
  return values;
}

GgufValue read_value(GgufReader& reader, std::string_view key) {
  const auto type = static_cast<ValueType>(reader.read<std::uint32_t>({key, "type"}));
  if (type == ValueType::kArray) return read_array(reader, key);
  return read_scalar(reader, type, key);
}

}  // namespace

GgufMetadata read_metadata(GgufReader& reader, std::size_t n_entries) {
  GgufMetadata metadata;
  for (std::size_t i = 0; i < n_entries; ++i) {
    const std::string_view key = read_key(reader, i);
    if (metadata.contains(key)) {
      reader.fail({key}, "one entry", "a second one (metadata entry " + std::to_string(i) + ")");
    }
    metadata.emplace(key, read_value(reader, key));
  }
  return metadata;
}

}  // namespace modularbase
