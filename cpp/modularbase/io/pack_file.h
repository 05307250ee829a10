#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "modularbase/core/pacer.h"
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
  /// \param pacer rests between tensors.
  /// \throws PackFormatError naming the file, the field, what was expected and what was found.
  static PackFile open(const std::string& path, Pacer pacer = {});

  const std::string& path() const { return file_.path(); }
  const MappedFile& file() const { return file_.file(); }
  const PackGeometry& geometry() const { return geometry_; }
  /// One per geometry().sites, in the same order.
  const std::vector<PackSiteTensors>& sites() const { return sites_; }
  float scale() const { return scale_; }
  const std::string& manifest_json() const { return manifest_json_; }
  /// Query centroids for routing, [n_embd, k] F32; null where the pack has none.
  const GgufTensor* profile() const { return profile_; }
  /// Token ids to try the pack on, and |h_pack - h_base| / |h_base| of the final hidden state at
  /// each; both empty where the pack has no probe.
  const std::vector<std::int32_t>& probe_tokens() const { return probe_tokens_; }
  const std::vector<float>& probe_effect() const { return probe_effect_; }
  /// Everything in the file, and one of it by name: nullptr when absent.
  const std::vector<GgufTensor>& tensors() const { return file_.tensors(); }
  const GgufTensor* find_tensor(std::string_view name) const { return file_.find_tensor(name); }
  std::span<const std::byte> bytes(const GgufTensor& tensor) const {
    return file_.tensor_bytes(tensor);
  }

 private:
  explicit PackFile(GgufFile file) : file_(std::move(file)) {}
  void read_geometry();
  void read_sites(Pacer& pacer);
  void read_profile();
  void read_probe();
  void refuse_unknown_tensors() const;
  const GgufTensor* tensor(const std::string& name, std::initializer_list<std::int64_t> ne,
                           ggml_type type) const;
  ggml_type type_of(const char* name, std::initializer_list<ggml_type> allowed) const;

  GgufFile file_;
  PackGeometry geometry_;
  std::vector<PackSiteTensors> sites_;
  float scale_ = 1.0f;
  std::string manifest_json_;
  const GgufTensor* profile_ = nullptr;
  std::vector<std::int32_t> probe_tokens_;
  std::vector<float> probe_effect_;
};

}  // namespace modularbase
