#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "modularbase/io/gguf_file.h"

namespace modularbase {

/// The shape of a pack: data in its file, never code. Packs of equal geometry share a pool.
struct PackGeometry {
  std::int64_t n_embd = 0;
  std::int64_t d_inner = 0;
  std::int64_t d_ff = 0;
  std::int64_t n_expert = 0;
  std::int64_t n_expert_used = 0;
  std::vector<int> sites;  // base layers, ascending
  float norm_eps = 0.0f;
  ggml_type adapter_type = GGML_TYPE_F16;  // F16, BF16 or F32
  ggml_type expert_type = GGML_TYPE_F16;   // Q4_K, Q4_0, Q8_0 or F16
  bool operator==(const PackGeometry&) const = default;
};

/// The tensors of one site, in the words of docs/pack-format.md.
struct PackSiteTensors {
  const GgufTensor* in;           // W_in     [n_embd, d_inner]
  const GgufTensor* norm;         // g_z      [d_inner] F32
  const GgufTensor* router;       // W_gate   [d_inner, n_expert] F32
  const GgufTensor* expert_gate;  // W_gate,e [d_inner, d_ff, n_expert]
  const GgufTensor* expert_up;    // W_up,e   [d_inner, d_ff, n_expert]
  const GgufTensor* expert_down;  // W_down,e [d_ff, d_inner, n_expert]
  const GgufTensor* out;          // W_out    [d_inner, n_embd]
  const GgufTensor* token_gate;   // v        [n_embd] F32, or null: factor 1
  const GgufTensor* token_bias;   // b        [1] F32, or null with it
};

/// A pack's file: GGUF whose geometry, names, shapes, types and numbers have been checked, so that
/// what follows may copy bytes.
class PackFile {
 public:
  /// \throws PackFormatError naming the file, the field, what was expected and what was found.
  static PackFile open(const std::string& path);

  const std::string& path() const { return file_.path(); }
  const MappedFile& file() const { return file_.file(); }
  const PackGeometry& geometry() const { return geometry_; }
  /// One per geometry().sites, in the same order.
  const std::vector<PackSiteTensors>& sites() const { return sites_; }
  float scale() const { return scale_; }
  const std::string& manifest_json() const { return manifest_json_; }
  std::span<const std::byte> bytes(const GgufTensor& tensor) const {
    return file_.tensor_bytes(tensor);
  }

 private:
  explicit PackFile(GgufFile file) : file_(std::move(file)) {}
  void read_geometry();
  void read_sites();
  void refuse_unknown_tensors() const;
  const GgufTensor* tensor(std::size_t site, const char* name,
                           std::initializer_list<std::int64_t> ne, ggml_type type) const;
  ggml_type type_of(const char* name, std::initializer_list<ggml_type> allowed) const;

  GgufFile file_;
  PackGeometry geometry_;
  std::vector<PackSiteTensors> sites_;
  float scale_ = 1.0f;
  std::string manifest_json_;
};

}  // namespace modularbase
