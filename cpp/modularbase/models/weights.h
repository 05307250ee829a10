#pragma once

#include <initializer_list>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "modularbase/graph/graph_builder.h"
#include "modularbase/io/gguf_file.h"

namespace modularbase {

/// In what type the base's matrices are held.
enum class DType {
  kAuto,  // 16- and 32-bit files: BF16 where the CPU multiplies it natively, else F16; quantised:
          // as they are
  kKeep,  // as the file has them, mapped without a copy
  kF16,
  kBF16,
  kF32,
};
/// \throws InvalidRequestError unless one of auto, keep, f16, bf16, f32.
DType parse_dtype(std::string_view name);

/// Owns the memory of a base's weights, mapped or converted.
struct WeightMemory {
  std::vector<ContextPtr> contexts;
  std::vector<BufferPtr> buffers;
  std::size_t n_bytes = 0;         // all weights, wherever they lie
  std::size_t n_bytes_mapped = 0;  // of them, still in the file's pages
};

/// Declares the tensors a family wants, checking each shape, then brings them all into memory at
/// once. The file must outlive the memory (mapped tensors point into it).
class WeightLoader {
 public:
  WeightLoader(const GgufFile& file, const Backend& backend, DType dtype);

  /// A matrix [n_in, n_out] in the requested dtype. \throws BaseLoadError when missing or
  /// misshapen.
  Tensor matrix(const std::string& name, std::int64_t n_in, std::int64_t n_out);
  /// A vector [n], always F32.
  Tensor vector(const std::string& name, std::int64_t n);
  /// null when the file has no such tensor.
  Tensor optional_matrix(const std::string& name, std::int64_t n_in, std::int64_t n_out);
  Tensor optional_vector(const std::string& name, std::int64_t n);

  /// \throws BaseLoadError for a tensor of the file that no one asked for; DeviceError when memory
  /// is short.
  WeightMemory finish();

 private:
  struct Entry {
    const GgufTensor* source;
    Tensor tensor;
  };
  Tensor declare(const std::string& name, bool required, std::int64_t ne0, std::int64_t ne1,
                 ggml_type type);
  ggml_type matrix_type(ggml_type source) const;
  bool can_map(const GgufTensor& source, ggml_type type) const;
  void map_tensors(WeightMemory& memory);
  void convert_tensors(WeightMemory& memory);

  const GgufFile& file_;
  const Backend& backend_;
  DType dtype_;
  ContextPtr mapped_ctx_;
  ContextPtr owned_ctx_;
  std::vector<Entry> mapped_;
  std::vector<Entry> owned_;
  std::map<std::string, Tensor> declared_;
};

}  // namespace modularbase
