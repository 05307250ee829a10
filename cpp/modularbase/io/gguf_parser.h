#pragma once

#include <cstddef>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "modularbase/io/gguf_file.h"
#include "modularbase/io/gguf_reader.h"

namespace modularbase {

using GgufMetadata = std::map<std::string, GgufValue, std::less<>>;

struct GgufContents {
  GgufMetadata metadata;
  std::vector<GgufTensor> tensors;
};

/// Reads and validates everything before the tensor data of a GGUF image. Total: any bytes give
/// contents whose tensors lie inside the image, or an error.
/// \throws BaseLoadError naming `path` as the file.
GgufContents parse_gguf(std::span<const std::byte> image, const std::string& path);

/// The two parts, each starting where the reader stands. `image_bytes` is the size of the whole
/// file and `alignment` a power of two.
GgufMetadata read_metadata(GgufReader& reader, std::size_t n_entries);
std::vector<GgufTensor> read_tensor_directory(GgufReader& reader, std::size_t n_tensors,
                                              std::size_t alignment, std::size_t image_bytes);

}  // namespace modularbase
