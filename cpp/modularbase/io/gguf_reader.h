#pragma once

#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <string_view>

namespace modularbase {

static_assert(std::endian::native == std::endian::little, "GGUF is read without swapping bytes");

/// What is being read, for messages: "tensor blk.0.attn_q.weight offset", "tokenizer.ggml.tokens
/// element 7". Holds views only, so that naming a field costs nothing until it is wrong.
struct GgufField {
  std::string_view owner;
  std::string_view part = {};
  std::optional<std::uint64_t> index = {};

  std::string text() const;
};

/// Walks the bytes of a GGUF header. Nothing is read, and nothing allocated, before it is known to
/// be there.
class GgufReader {
 public:
  /// Borrows both arguments.
  GgufReader(std::span<const std::byte> bytes, const std::string& path)
      : bytes_(bytes), path_(path) {}

  std::size_t position() const { return position_; }
  std::size_t remaining() const { return bytes_.size() - position_; }

  template <typename T>
    requires std::integral<T> || std::floating_point<T>
  T read(const GgufField& field) {
    require(sizeof(T), field);
    T value;
    std::memcpy(&value, bytes_.data() + position_, sizeof(T));
    position_ += sizeof(T);
    return value;
  }

  /// One byte that is 0 or 1.
  bool read_bool(const GgufField& field);

  /// A 64-bit length and that many bytes; the view points into the file.
  std::string_view read_string(const GgufField& field);

  /// A 64-bit count of things that take at least `min_bytes_each` in the rest of the file.
  std::size_t read_count(const GgufField& field, std::size_t min_bytes_each);

  [[noreturn]] void fail(const GgufField& field, std::string_view expected,
                         std::string_view found) const;

 private:
  void require(std::size_t n_bytes, const GgufField& field) const {
    if (n_bytes > remaining()) fail_truncated(n_bytes, field);
  }
  [[noreturn]] void fail_truncated(std::size_t n_bytes, const GgufField& field) const;

  std::span<const std::byte> bytes_;
  const std::string& path_;
  std::size_t position_ = 0;
};

}  // namespace modularbase
