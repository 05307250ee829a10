#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace modularbase::testing {

using Bytes = std::vector<std::byte>;

/// Little-endian, as GGUF wants them.
template <typename T>
void append(Bytes& out, T value) {
  // Not by insert, of which GCC 12 warns wrongly that it writes behind the end.
  const std::size_t at = out.size();
  out.resize(at + sizeof(T));
  std::memcpy(out.data() + at, &value, sizeof(T));
}

inline void append_string(Bytes& out, std::string_view text) {
  append<std::uint64_t>(out, text.size());
  const auto* begin = reinterpret_cast<const std::byte*>(text.data());
  out.insert(out.end(), begin, begin + text.size());
}

/// GGUF's numbers of the value types the tests use.
enum ValueType : std::uint32_t {
  kU8 = 0,
  kU32 = 4,
  kI32 = 5,
  kF32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
  kU64 = 10,
};

/// One metadata entry: `payload` is everything after the type number.
struct Entry {
  std::string key;
  std::uint32_t type;
  Bytes payload;
};

struct Tensor {
  std::string name;
  std::vector<std::uint64_t> ne;  // ggml order, as many as the tensor has dimensions
  std::uint32_t type;             // ggml's number
  Bytes data;
  std::optional<std::uint64_t> offset = {};  // set: written instead of the true one
  std::optional<std::uint32_t> n_dims = {};  // set: written instead of ne.size()
};

/// Builds a GGUF image in memory. Every field is public and written as it is, so that a test can
/// state a wrong value; what is left alone comes out valid.
class GgufWriter {
 public:
  std::uint32_t magic = 0x46554747;
  std::uint32_t version = 3;
  std::uint64_t alignment = 32;  // of the layout; add "general.alignment" where it is not 32
  std::optional<std::uint64_t> n_tensors = {};
  std::optional<std::uint64_t> n_entries = {};
  std::vector<Entry> entries;
  std::vector<Tensor> tensors;

  template <typename T>
  void add(std::string key, std::uint32_t type, T value) {
    append(entries.emplace_back(Entry{std::move(key), type, {}}).payload, value);
  }
  void add_u32(std::string key, std::uint32_t value) { add(std::move(key), kU32, value); }
  void add_f32(std::string key, float value) { add(std::move(key), kF32, value); }
  void add_string(std::string key, std::string_view value) {
    append_string(entries.emplace_back(Entry{std::move(key), kString, {}}).payload, value);
  }

  template <typename T>
  void add_array(std::string key, std::uint32_t element_type, const std::vector<T>& values) {
    Bytes& payload = entries.emplace_back(Entry{std::move(key), kArray, {}}).payload;
    append(payload, element_type);
    append<std::uint64_t>(payload, values.size());
    for (const T& value : values) append(payload, value);
  }
  void add_strings(std::string key, const std::vector<std::string>& values) {
    Bytes& payload = entries.emplace_back(Entry{std::move(key), kArray, {}}).payload;
    append<std::uint32_t>(payload, kString);
    append<std::uint64_t>(payload, values.size());
    for (const std::string& value : values) append_string(payload, value);
  }

  Tensor& add_tensor(std::string name, std::uint32_t type, std::vector<std::uint64_t> ne,
                     Bytes data) {
    return tensors.emplace_back(Tensor{std::move(name), std::move(ne), type, std::move(data)});
  }
  Tensor& add_f32_tensor(std::string name, std::vector<std::uint64_t> ne,
                         std::span<const float> values) {
    const auto bytes = std::as_bytes(values);
    return add_tensor(std::move(name), 0, std::move(ne), Bytes(bytes.begin(), bytes.end()));
  }

  /// For tests that spoil a sound file.
  Tensor& tensor(const std::string& name) {
    for (Tensor& tensor : tensors) {
      if (tensor.name == name) return tensor;
    }
    throw std::out_of_range(name);
  }
  void remove_tensor(const std::string& name) {
    std::erase_if(tensors, [&](const Tensor& tensor) { return tensor.name == name; });
  }
  void remove_entry(const std::string& key) {
    std::erase_if(entries, [&](const Entry& entry) { return entry.key == key; });
  }

  Bytes image() const {
    Bytes out;
    append(out, magic);
    append(out, version);
    append(out, n_tensors.value_or(tensors.size()));
    append(out, n_entries.value_or(entries.size()));
    for (const Entry& entry : entries) append_entry(out, entry);
    append_directory(out);
    for (const Tensor& tensor : tensors) {
      pad(out);
      out.insert(out.end(), tensor.data.begin(), tensor.data.end());
    }
    return out;
  }

 private:
  std::uint64_t padded(std::uint64_t n) const {
    return (n + alignment - 1) / alignment * alignment;
  }
  void pad(Bytes& out) const { out.resize(padded(out.size())); }

  static void append_entry(Bytes& out, const Entry& entry) {
    append_string(out, entry.key);
    append(out, entry.type);
    out.insert(out.end(), entry.payload.begin(), entry.payload.end());
  }

  void append_directory(Bytes& out) const {
    std::uint64_t offset = 0;
    for (const Tensor& tensor : tensors) {
      append_string(out, tensor.name);
      append(out, tensor.n_dims.value_or(static_cast<std::uint32_t>(tensor.ne.size())));
      for (const std::uint64_t ne : tensor.ne) append(out, ne);
      append(out, tensor.type);
      append(out, tensor.offset.value_or(offset));
      offset = padded(offset + tensor.data.size());
    }
  }
};

/// A valid file with each kind of value and three tensors of different types.
inline GgufWriter small_valid_file() {
  GgufWriter writer;
  writer.add_string("general.architecture", "llama");
  writer.add_u32("llama.block_count", 2);
  writer.add("llama.negative", kI32, std::int32_t{-5});
  writer.add("llama.big", kU64, std::uint64_t{1} << 63);
  writer.add_f32("llama.rope.freq_base", 10000.0f);
  writer.add("llama.flag", kBool, std::uint8_t{1});
  writer.add_strings("tokenizer.ggml.tokens", {"<s>", "a", "\xff\xfe", ""});
  writer.add_array<std::int32_t>("tokenizer.ggml.token_type", kI32, {3, 1, -1, 1});
  writer.add_array<float>("tokenizer.ggml.scores", kF32, {0.0f, -1.5f});
  writer.add_array<std::uint8_t>("flags", kBool, {1, 0, 1});
  writer.add_tensor("token_embd.weight", 0, {4, 3}, Bytes(48, std::byte{1}));
  writer.add_tensor("blk.0.attn_q.weight", 8, {32, 2}, Bytes(68, std::byte{2}));  // Q8_0
  writer.add_tensor("output_norm.weight", 1, {5}, Bytes(10, std::byte{3}));       // F16
  return writer;
}

}  // namespace modularbase::testing
