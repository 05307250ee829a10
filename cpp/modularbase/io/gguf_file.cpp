#include "modularbase/io/gguf_file.h"

#include <utility>

#include "modularbase/core/errors.h"
#include "modularbase/io/gguf_parser.h"

namespace modularbase {
namespace {

const char* kind_name(const GgufValue& value) {
  constexpr const char* kScalars[] = {"a boolean", "an integer", "an integer", "a float",
                                      "a string"};
  constexpr const char* kArrays[] = {"an array of booleans", "an array of integers",
                                     "an array of integers", "an array of floats",
                                     "an array of strings"};
  if (const auto* scalar = std::get_if<GgufScalar>(&value)) return kScalars[scalar->index()];
  return kArrays[std::get<GgufArray>(value).index()];
}

template <typename T>
const T* scalar_as(const GgufValue& value) {
  const auto* scalar = std::get_if<GgufScalar>(&value);
  return scalar != nullptr ? std::get_if<T>(scalar) : nullptr;
}

template <typename T>
std::optional<T> optional_as(const GgufFile& file, std::string_view key, const char* expected) {
  const GgufValue* value = file.find(key);
  if (value == nullptr) return std::nullopt;
  if (const T* found = scalar_as<T>(*value)) return *found;
  throw BaseLoadError(file.path(), key, expected, kind_name(*value));
}

template <typename T>
T required(std::optional<T> value, const GgufFile& file, std::string_view key,
           const char* expected) {
  if (!value) throw BaseLoadError(file.path(), key, expected, "no such key");
  return *std::move(value);
}

std::string range_text(std::int64_t min, std::int64_t max) {
  return "an integer from " + std::to_string(min) + " to " + std::to_string(max);
}

}  // namespace

GgufFile GgufFile::open(const std::string& path) {
  GgufFile file{MappedFile(path)};
  GgufContents contents = parse_gguf(file.file_.bytes(), path);
  file.metadata_ = std::move(contents.metadata);
  file.tensors_ = std::move(contents.tensors);
  file.tensor_index_.reserve(file.tensors_.size());
  for (std::size_t i = 0; i < file.tensors_.size(); ++i) {
    file.tensor_index_.emplace(file.tensors_[i].name, i);
  }
  return file;
}

const GgufValue* GgufFile::find(std::string_view key) const {
  const auto it = metadata_.find(key);
  return it == metadata_.end() ? nullptr : &it->second;
}

const GgufTensor* GgufFile::find_tensor(std::string_view name) const {
  const auto it = tensor_index_.find(name);
  return it == tensor_index_.end() ? nullptr : &tensors_[it->second];
}

std::span<const std::byte> GgufFile::tensor_bytes(const GgufTensor& tensor) const {
  return file_.bytes().subspan(tensor.offset, tensor.n_bytes);
}

std::optional<std::int64_t> GgufFile::optional_int(std::string_view key, std::int64_t min,
                                                   std::int64_t max) const {
  const GgufValue* value = find(key);
  if (value == nullptr) return std::nullopt;
  const auto* as_signed = scalar_as<std::int64_t>(*value);
  const auto* as_unsigned = scalar_as<std::uint64_t>(*value);
  if (as_signed == nullptr && as_unsigned == nullptr) {
    throw BaseLoadError(path(), key, range_text(min, max), kind_name(*value));
  }
  const bool fits = as_signed != nullptr ? *as_signed >= min && *as_signed <= max
                                         : std::in_range<std::int64_t>(*as_unsigned) &&
                                               static_cast<std::int64_t>(*as_unsigned) >= min &&
                                               static_cast<std::int64_t>(*as_unsigned) <= max;
  if (!fits) {
    throw BaseLoadError(path(), key, range_text(min, max),
                        as_signed ? std::to_string(*as_signed) : std::to_string(*as_unsigned));
  }
  return as_signed != nullptr ? *as_signed : static_cast<std::int64_t>(*as_unsigned);
}

std::int64_t GgufFile::required_int(std::string_view key, std::int64_t min,
                                    std::int64_t max) const {
  const auto value = optional_int(key, min, max);
  if (!value) throw BaseLoadError(path(), key, range_text(min, max), "no such key");
  return *value;
}

std::optional<double> GgufFile::optional_float(std::string_view key) const {
  return optional_as<double>(*this, key, "a float");
}

double GgufFile::required_float(std::string_view key) const {
  return required(optional_float(key), *this, key, "a float");
}

std::optional<std::string> GgufFile::optional_string(std::string_view key) const {
  return optional_as<std::string>(*this, key, "a string");
}

std::string GgufFile::required_string(std::string_view key) const {
  return required(optional_string(key), *this, key, "a string");
}

std::optional<bool> GgufFile::optional_bool(std::string_view key) const {
  return optional_as<bool>(*this, key, "a boolean");
}

}  // namespace modularbase
