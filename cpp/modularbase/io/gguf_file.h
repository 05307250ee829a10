#pragma once

#include <ggml.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <variant>
#include <vector>

#include "modularbase/core/mapped_file.h"

namespace modularbase {

/// One metadata value; integers are widened, so that readers need not care which width a writer
/// chose.
using GgufScalar = std::variant<bool, std::int64_t, std::uint64_t, double, std::string>;
/// Arrays of one scalar kind. Nested arrays are refused (no writer of base models makes them).
using GgufArray =
    std::variant<std::vector<bool>, std::vector<std::int64_t>, std::vector<std::uint64_t>,
                 std::vector<double>, std::vector<std::string>>;
using GgufValue = std::variant<GgufScalar, GgufArray>;

/// One entry of the tensor directory, fully validated: its bytes lie inside the file.
struct GgufTensor {
  std::string name;
  ggml_type type;
  std::array<std::int64_t, 4> ne;  // ggml order, unused dimensions are 1
  std::size_t offset;              // from the start of the file
  std::size_t n_bytes;
};

/// A GGUF v2/v3 file: memory-mapped, with every count, length, type, shape and offset checked
/// before use, so that nothing malformed ever reaches ggml (whose asserts abort the process).
class GgufFile {
 public:
  /// \throws BaseLoadError naming the file, the field, what was expected and what was found.
  static GgufFile open(const std::string& path);

  const std::string& path() const { return file_.path(); }
  const MappedFile& file() const { return file_; }
  const std::map<std::string, GgufValue, std::less<>>& metadata() const { return metadata_; }
  const std::vector<GgufTensor>& tensors() const { return tensors_; }

  /// nullptr when absent.
  const GgufValue* find(std::string_view key) const;
  const GgufTensor* find_tensor(std::string_view name) const;
  std::span<const std::byte> tensor_bytes(const GgufTensor& tensor) const;

  /// Typed reads. The `required_` forms throw BaseLoadError when absent; all throw on a wrong type,
  /// and integers on a value outside [min, max].
  std::int64_t required_int(std::string_view key, std::int64_t min, std::int64_t max) const;
  std::optional<std::int64_t> optional_int(std::string_view key, std::int64_t min,
                                           std::int64_t max) const;
  double required_float(std::string_view key) const;
  std::optional<double> optional_float(std::string_view key) const;
  std::string required_string(std::string_view key) const;
  std::optional<std::string> optional_string(std::string_view key) const;
  std::optional<bool> optional_bool(std::string_view key) const;

 private:
  explicit GgufFile(MappedFile file) : file_(std::move(file)) {}
  MappedFile file_;
  std::map<std::string, GgufValue, std::less<>> metadata_;
  std::vector<GgufTensor> tensors_;
  std::unordered_map<std::string_view, std::size_t> tensor_index_;  // views into tensors_[i].name
};

}  // namespace modularbase
