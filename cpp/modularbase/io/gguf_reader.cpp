#include "modularbase/io/gguf_reader.h"

#include <utility>

#include "modularbase/core/errors.h"

namespace modularbase {

std::string GgufField::text() const {
  std::string text(owner);
  if (!part.empty()) text.append(" ").append(part);
  if (index) text.append(" ").append(std::to_string(*index));
  return text;
}

bool GgufReader::read_bool(const GgufField& field) {
  const auto byte = read<std::uint8_t>(field);
  if (byte > 1) fail(field, "0 or 1 (a boolean)", std::to_string(byte));
  return byte == 1;
}

std::string_view GgufReader::read_string(const GgufField& field) {
  const auto n_bytes = read<std::uint64_t>(field);
  if (n_bytes > remaining()) {
    fail(field,
         "a string length of at most " + std::to_string(remaining()) + " (the rest of the file)",
         std::to_string(n_bytes));
  }
  const auto* begin = reinterpret_cast<const char*>(bytes_.data() + position_);
  position_ += n_bytes;
  return {begin, static_cast<std::size_t>(n_bytes)};
}

std::size_t GgufReader::read_count(const GgufField& field, std::size_t min_bytes_each) {
  const auto count = read<std::uint64_t>(field);
  const std::size_t limit = remaining() / min_bytes_each;
  if (count > limit) {
    fail(field,
         "a count of at most " + std::to_string(limit) + " (what the rest of the file can hold)",
         std::to_string(count));
  }
  return static_cast<std::size_t>(count);
}

void GgufReader::fail(const GgufField& field, std::string_view expected,
                      std::string_view found) const {
  throw BaseLoadError(path_, field.text(), expected, found);
}

void GgufReader::fail_truncated(std::size_t n_bytes, const GgufField& field) const {
  fail(field, std::to_string(n_bytes) + " bytes at offset " + std::to_string(position_),
       "only " + std::to_string(remaining()) + " (the file is truncated)");
}

}  // namespace modularbase
